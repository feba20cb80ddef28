"""HRA: Householder Reflection Adaptation (Yuan et al. 2024, arXiv 2405.17484).

    W' = W H(u_1) ... H(u_r)       H(u) = I - 2 u uᵀ / uᵀu              u_i: columns of U (n, r)
    W' = W (I - 2 Q Qᵀ)            apply_GS: Q from Gram-Schmidt on U; one reflection of an r-dimensional space

The product is orthogonal: it keeps the spectrum of W. n: input features; on convolutions the patch, W as W.flatten(1), one
product for all groups. Starts as the identity for even r: columns come in equal pairs, whose reflections cancel. Odd r and
apply_GS have no start at the identity, as in PEFT; with apply_GS the columns start independent here (PEFT's equal pairs
leave Gram-Schmidt with rounding noise). Right where PEFT is wrong or fails: dilation, rectangular kernels, groups.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..config import LORA_ONLY, AdapterConfig
from ..fields import rank
from ..kernels.householder import householder
from .base import InputMap, Tensor
from .inits import kaiming
from .matrices import row_size
from .orthogonal import NO_INPUTS, single


@dataclass
class HRAConfig(AdapterConfig):
    peft_type = "HRA"
    absent = LORA_ONLY

    r: int = rank(8)
    apply_GS: bool = False
    init_weights: bool = True

    def with_rank(self, rank):
        return super().with_rank(rank) if self.apply_GS else replace(self, r=rank)


class HRA(InputMap):
    name = "HRA"
    refuses = NO_INPUTS
    Config = HRAConfig
    written = ("apply_GS",)

    def check(self, target, config):
        n = row_size(target)
        if config.apply_GS and config.r > n:
            return f"apply_GS: r={config.r} directions cannot be independent in {n} input features; nearest valid: {n}"
        return None

    def advice(self, target, config):
        if not config.init_weights or config.r % 2 == 0:
            return None
        return f"r={config.r} is odd: directions cannot start in pairs that cancel, so the start is no identity"

    def tensors(self, target, config):
        paired = config.init_weights and config.r % 2 == 0 and not config.apply_GS
        pad = () if config.apply_GS else ((1, 1),)  # a column of zeros reflects nothing
        shape = row_size(target), config.r
        return {"hra_u": Tensor(shape, pairs if paired else kaiming, "hra_u", pad=pad)}

    def neutral(self, target, config):
        return None if config.apply_GS else {"hra_u": 0.0}

    def map_input(self, x, theta, target, config):
        return householder(x, directions(theta, config), True)

    def weight(self, W, b, theta, target, config):
        return householder(W.flatten(1), directions(theta, config), False).reshape(W.shape), b


def directions(theta, config: HRAConfig) -> torch.Tensor:
    """Columns to reflect along, (n, r)."""
    U = theta["hra_u"]
    return torch.linalg.qr(single(U)).Q.to(U.dtype) if config.apply_GS else U


def pairs(tensor, W=None):
    half = tensor.new_empty(tensor.shape[0], tensor.shape[1] // 2)
    kaiming(half)
    tensor.copy_(half.repeat_interleave(2, dim=-1))
