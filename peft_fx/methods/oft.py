"""OFT: Orthogonal Finetuning (Qiu et al. 2023, arXiv 2306.07280), as OFTv2 (Qiu et al. 2025, arXiv 2506.19847) has it.

    W' = W blockdiag(R_1 .. R_D)ᵀ                y = W (x blockdiag(R)) + b        R_i: (c, c), c D = n input features
    R  = I + 2 Q + 2 Q² + ... + Q^(t - 1)        use_cayley_neumann: t terms of (I + Q)(I - Q)^-1
    R  = (I - Q)(I + Q)^-1                       otherwise; the opposite rotation
    coft: Q is first scaled into the ball |Q| <= eps / sqrt(D); as in PEFT, the gradient passes it unchanged

Q_i is skew-symmetric, kept as its upper triangle (c (c - 1) / 2); block_share: one for all blocks. The block size (or the
number of blocks, r) moves to the nearest divisor of n. On convolutions n counts the patch, W as W.flatten(1); on embeddings
the output features are rotated. Starts as the identity. module_dropout leaves each block out with that probability.
Right where PEFT is wrong: convolutions with kernels (PEFT adds up overlapping patches), dilation, groups; module_dropout has
no effect in PEFT; the stored numbers are not overwritten by coft.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional as F

from ..config import LORA_ONLY, AdapterConfig
from ..errors import RecipeError
from . import get_method
from .base import InputMap, Method, OutputMap, Tensor
from .inits import scaled_normal, zeros
from .orthogonal import NO_INPUTS, cayley, identity_like, nearest_divisor, neumann, patch_size, rotate_blocks, skew


@dataclass(frozen=True)
class OFTConfig(AdapterConfig):
    peft_type = "OFT"
    absent = LORA_ONLY

    r: int = 0
    oft_block_size: int = 32
    module_dropout: float = 0.0
    fan_in_fan_out: bool = False
    init_weights: bool = True
    coft: bool = False
    eps: float = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5

    def __post_init__(self):
        super().__post_init__()
        sizes = (self.r, self.oft_block_size)
        if min(sizes) < 0 or (self.r == 0) == (self.oft_block_size == 0):
            raise RecipeError(
                f"(r, oft_block_size)={sizes}: one has to be positive, the other 0, as r x size = features"
            )
        if not 0.0 <= self.module_dropout < 1.0:
            raise RecipeError(f"module_dropout: expected 0 <= p < 1, got {self.module_dropout!r}")
        if self.use_cayley_neumann and self.num_cayley_neumann_terms < 2:
            raise RecipeError(
                f"num_cayley_neumann_terms={self.num_cayley_neumann_terms}: expected 2 or more; 1 is no rotation"
            )


class Rotating(Method):
    """What both sides have in common. features: how many there are to rotate. KEY: suffix of the key in the file."""

    Config = OFTConfig
    KEY: str

    def features(self, target) -> int:
        raise NotImplementedError

    def check(self, target, config):
        n = self.features(target)
        if config.module_dropout and target.kind != "linear":
            return f"module_dropout={config.module_dropout} has no form on kind {target.kind}; set it to 0"
        if block_size(n, config) < 2:
            valid = ", ".join(str(d) for d in range(2, n + 1) if n % d == 0)
            return f"blocks of one feature cannot rotate: {n} features allow oft_block_size {valid or 'none'}"
        return None

    def tensors(self, target, config):
        c = block_size(self.features(target), config)
        blocks = 1 if config.block_share else self.features(target) // c
        experts = target.shape[:-2] if target.experts else ()
        start = zeros if config.init_weights else partial(scaled_normal, 0.1)
        return {"oft_R": Tensor((*experts, blocks, c * (c - 1) // 2), start, self.KEY)}

    def neutral(self, target, config):
        return {"oft_R": 0.0}

    def activation_only(self, target, config):
        return f"module_dropout={config.module_dropout}" if config.module_dropout else None

    def literals(self, target, config):
        terms = config.num_cayley_neumann_terms if config.use_cayley_neumann else None
        return config.coft and config.eps, terms, config.module_dropout

    def rotations(self, theta, target, config):
        """(experts?, D, c, c)"""
        n = self.features(target)
        c = block_size(n, config)
        Q = skew(theta["oft_R"], c)
        if config.coft:
            Q = Q + (into_ball(Q, config.eps) - Q).detach()
        R = neumann(Q, config.num_cayley_neumann_terms) if config.use_cayley_neumann else cayley(Q)
        return R.expand(*R.shape[:-3], n // c, c, c)


class OFT(Rotating, InputMap):
    name = "OFT"
    refuses = NO_INPUTS
    KEY = "oft_R.weight"

    def at(self, target, config):
        return get_method("OFT_OUTPUT") if target.kind == "embedding" else self

    def features(self, target):
        return patch_size(target)

    def map_input(self, x, theta, target, config):
        R = self.rotations(theta, target, config)
        if config.module_dropout:
            kept = F.dropout(R.new_ones((*R.shape[:-2], 1, 1)), config.module_dropout, True) > 0
            R = torch.where(kept, R, identity_like(R))
        return rotate_blocks(x, R)

    def weight(self, W, b, theta, target, config):
        flat = W.flatten(1) if target.kernel else W
        return rotate_blocks(flat, self.rotations(theta, target, config).mT).reshape(W.shape), b


class OFTOutput(Rotating, OutputMap):
    """Embeddings: the looked-up vectors are rotated."""

    name = "OFT_OUTPUT"
    KEY = "oft_embedding_R.weight"

    def features(self, target):
        return target.out_features

    def map_output(self, y, theta, target, config):
        return rotate_blocks(y, self.rotations(theta, target, config))


def block_size(n: int, config: OFTConfig) -> int:
    """c, moved to the nearest divisor of n."""
    return n // nearest_divisor(n, config.r) if config.r else nearest_divisor(n, config.oft_block_size)


def into_ball(Q: torch.Tensor, eps: float) -> torch.Tensor:
    """Each block scaled down to Frobenius norm eps / sqrt(D), where it is above that."""
    radius = eps / Q.shape[-3] ** 0.5
    norm = torch.linalg.vector_norm(Q, dim=(-2, -1), keepdim=True)
    return torch.where(norm <= radius, Q, Q * (radius / norm))
