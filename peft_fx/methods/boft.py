"""BOFT: Orthogonal Finetuning via Butterfly Factorization (Liu et al. 2023, arXiv 2311.06243).

    W' = diag(s) W M_0ᵀ M_1ᵀ ... M_{N-1}ᵀ           N = boft_n_butterfly_factor; the bias is not scaled
    M_i = P_i blockdiag(Q_i1 .. Q_iD) P_iᵀ          Q = (I - S)(I + S)^-1,  S = (R - Rᵀ) / 2     R: (N, D, c, c), c D = n
    P_i: in every group of 2^i c features, the 2^(i + 1) chunks of c / 2: those at even places first; P_0 = I

so that factor i mixes features across 2^i blocks. n: input features; on convolutions the patch, W as W.flatten(1), one
rotation for all groups. Starts as the identity (R = 0, s = 1). Any number of factors works here; PEFT has one unless its CUDA
extension is compiled. Right where PEFT fails: dilation, rectangular kernels, groups. boft_dropout would need a random weight,
which merging could not keep, and is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import init

from ..config import LORA_ONLY, AdapterConfig
from ..errors import RecipeError
from .base import Rewrite, Tensor
from .inits import ones, scaled_normal, zeros
from .orthogonal import NO_INPUTS, cayley, nearest_divisor, patch_size, rotate_blocks


@dataclass(frozen=True)
class BOFTConfig(AdapterConfig):
    peft_type = "BOFT"
    absent = LORA_ONLY

    boft_block_size: int = 4
    boft_block_num: int = 0
    boft_n_butterfly_factor: int = 1
    boft_dropout: float = 0.0
    fan_in_fan_out: bool = False
    init_weights: bool = True

    def __post_init__(self):
        super().__post_init__()
        sizes = (self.boft_block_size, self.boft_block_num)
        if min(sizes) < 0 or (sizes[0] == 0) == (sizes[1] == 0):
            raise RecipeError(f"(boft_block_size, boft_block_num)={sizes}: one has to be positive, the other 0")
        if self.boft_n_butterfly_factor < 1:
            raise RecipeError(f"boft_n_butterfly_factor={self.boft_n_butterfly_factor}: expected 1 or more")


class BOFT(Rewrite):
    name = "BOFT"
    refuses = NO_INPUTS
    Config = BOFTConfig

    def check(self, target, config):
        if config.boft_dropout:
            return f"BOFT rewrites the weight, which cannot be random: boft_dropout={config.boft_dropout}; set it to 0"
        n, N = patch_size(target), config.boft_n_butterfly_factor
        given = "boft_block_size" if config.boft_block_size else "boft_block_num"
        if n % getattr(config, given):
            nearest = nearest_divisor(n, getattr(config, given))
            return f"{given}={getattr(config, given)} does not divide {n} input features; nearest valid: {nearest}"
        D, c = blocks(target, config)
        if c < 2:
            return f"{given}={getattr(config, given)}: blocks of one feature cannot rotate"
        if N > 1 and (c % 2 or D % 2 ** (N - 1)):
            twos = (D & -D).bit_length() if c % 2 == 0 else 1
            reason = f"needs blocks of even size, and a number of blocks to halve {N - 1} times, not {D} of size {c}"
            return f"boft_n_butterfly_factor={N} {reason}; nearest valid: {twos}"
        return None

    def tensors(self, target, config):
        experts = target.shape[:-2] if target.experts else ()
        D, c = blocks(target, config)
        m, N = target.out_features, config.boft_n_butterfly_factor
        start, scale = (zeros, ones) if config.init_weights else (partial(scaled_normal, 0.1), near_one)
        return {
            "boft_R": Tensor((*experts, N, D, c, c), start, "boft_R"),
            "boft_s": Tensor((1, m) if target.kernel else (*experts, m, 1), scale, "boft_s"),
        }

    def neutral(self, target, config):
        return {"boft_R": 0.0, "boft_s": 1.0}

    def weight(self, W, b, theta, target, config):
        R, flat = theta["boft_R"], W.flatten(1) if target.kernel else W
        Q, chunk = cayley((R - R.mT) / 2), R.shape[-1] // 2
        for i, factor in enumerate(Q.mT.unbind(-4)):
            flat = unriffled(rotate_blocks(riffled(flat, chunk, 2**i), factor), chunk, 2**i)
        scale = theta["boft_s"].mT if target.kernel else theta["boft_s"]
        return (flat * scale).reshape(W.shape), b


def blocks(target, config: BOFTConfig) -> tuple[int, int]:
    """Number and size of the blocks: D, c."""
    n = patch_size(target)
    D = config.boft_block_num or n // config.boft_block_size
    return D, n // D


def riffled(x: torch.Tensor, chunk: int, blocks: int) -> torch.Tensor:
    """x P: in every group of 2 * blocks chunks, the first and the second half become the even and the odd places."""
    return x if blocks == 1 else x.unflatten(-1, (-1, 2, blocks, chunk)).transpose(-3, -2).flatten(-4)


def unriffled(x: torch.Tensor, chunk: int, blocks: int) -> torch.Tensor:
    """x Pᵀ, the inverse."""
    return x if blocks == 1 else x.unflatten(-1, (-1, blocks, 2, chunk)).transpose(-3, -2).flatten(-4)


def near_one(tensor, W=None):
    init.normal_(tensor, mean=1.0, std=0.1)
