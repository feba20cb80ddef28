"""BOFT: Orthogonal Finetuning via Butterfly Factorization (Liu et al. 2023, arXiv 2311.06243).

    W' = diag(s) W M_0ᵀ M_1ᵀ ... M_{N-1}ᵀ           N = boft_n_butterfly_factor; the bias is not scaled
    M_i = P_i blockdiag(Q_i1 .. Q_iD) P_iᵀ          Q = (I - S)(I + S)^-1,  S = (R - Rᵀ) / 2     R: (N, D, c, c), c D = n
    P_i: in every group of 2^i c features, the 2^(i + 1) chunks of c / 2: those at even places first; P_0 = I

Factor i mixes features across 2^i blocks. n: input features; on convolutions the patch, W as W.flatten(1), one rotation for
all groups. Starts as the identity (R = 0, s = 1). boft_dropout: while training, of one factor at random, that share of the
blocks, rounded down, is left out. PEFT has one factor unless its CUDA extension is compiled, and fails on dilation, rectangular
kernels and groups.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..config import LORA_ONLY, AdapterConfig
from ..fields import probability, rank
from ..kernels.butterfly import butterfly
from .base import Branch, InputMap, Tensor
from .inits import near
from .matrices import row_size
from .orthogonal import NO_INPUTS, cayley, without_blocks_of_one
from .shapes import indivisible


@dataclass
class BOFTConfig(AdapterConfig):
    peft_type = "BOFT"
    absent = LORA_ONLY
    alternatives = ("boft_block_size", "boft_block_num")

    boft_block_size: int = 4
    boft_block_num: int = 0
    boft_n_butterfly_factor: int = rank(1)
    boft_dropout: float = probability(0.0)
    fan_in_fan_out: bool = False
    init_weights: bool = True


class BOFT(InputMap, Branch):
    name = "BOFT"
    refuses = NO_INPUTS
    reads = ("y",)
    Config = BOFTConfig
    one_size = "the size and the number of the blocks say which features are rotated together"
    written = ("boft_dropout",)
    off = {"boft_R": 0.0, "boft_s": 1.0}

    def check(self, target, config):
        n, N = row_size(target), config.boft_n_butterfly_factor
        name = "boft_block_num" if config.boft_block_num else "boft_block_size"
        if fault := indivisible(name, getattr(config, name), n, f"{n} input features"):
            return fault
        D, c = blocks(target, config)
        if c < 2:
            return f"{name}={getattr(config, name)}: blocks of one feature cannot rotate"
        largest = 1 if c % 2 else (D & -D).bit_length()
        if largest < N:
            reason = f"needs blocks of even size, and a number of blocks to halve {N - 1} times, not {D} of size {c}"
            return f"boft_n_butterfly_factor={N} {reason}; nearest valid: {largest}"
        return None

    def tensors(self, target, config):
        (D, c), m, N = blocks(target, config), target.out_features, config.boft_n_butterfly_factor
        s = Tensor((1, m) if target.kernel else (m, 1), near(1.0, config), "boft_s")
        return {"boft_R": Tensor((N, D, c, c), near(0.0, config), "boft_R"), "boft_s": s}

    def map_input(self, x, theta, target, config):
        for i, Q in reversed([*enumerate(rotations(theta["boft_R"], config.boft_dropout))]):
            x = butterfly(x, Q, 2**i)
        return x

    def delta(self, x, theta, target, config):
        return theta["y"] * (theta["boft_s"].flatten() - 1)

    def weight(self, W, b, theta, target, config):
        return self.training_weight(W, b, theta, target, replace(config, boft_dropout=0.0))

    def training_weight(self, W, b, theta, target, config):
        flat = W.flatten(1)
        for i, Q in enumerate(rotations(theta["boft_R"], config.boft_dropout)):
            flat = butterfly(flat, Q.mT, 2**i)
        return (flat * theta["boft_s"].reshape(-1, 1)).reshape(W.shape), b


def blocks(target, config: BOFTConfig) -> tuple[int, int]:
    """Number and size of the blocks: D, c."""
    D = config.boft_block_num or row_size(target) // config.boft_block_size
    return D, row_size(target) // D


def rotations(R, dropout: float):
    """Q of each factor, (D, c, c)."""
    return without_blocks_of_one(cayley((R - R.mT) / 2), int(dropout * R.shape[1])).unbind(0)
