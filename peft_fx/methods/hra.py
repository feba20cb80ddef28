"""HRA: Householder Reflection Adaptation (Yuan et al. 2024, arXiv 2405.17484).

    W' = W H(u_1) ... H(u_r)       H(u) = I - 2 u uᵀ / uᵀu              u_i: columns of U (n, r)
       = W (I - U T Uᵀ)            T^-1 = triu(UᵀU, 1) + diag(UᵀU) / 2   all reflections at once
    W' = W (I - 2 Q Qᵀ)            apply_GS: Q from Gram-Schmidt on U; one reflection of an r-dimensional space

The product is orthogonal: it keeps the spectrum of W. n: input features; on convolutions the patch, W as W.flatten(1), one
product for all groups. Starts as the identity for even r: columns come in equal pairs, whose reflections cancel. Odd r and
apply_GS have no start at the identity, as in PEFT; with apply_GS the columns start independent here (PEFT's equal pairs
leave Gram-Schmidt with rounding noise). Right where PEFT is wrong or fails: dilation, rectangular kernels, groups.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F

from ..config import LORA_ONLY, AdapterConfig, check_rank
from .base import InputMap, Tensor
from .inits import each, kaiming
from .orthogonal import NO_INPUTS, identity_like, patch_size, single


@dataclass(frozen=True)
class HRAConfig(AdapterConfig):
    peft_type = "HRA"
    absent = LORA_ONLY

    r: int = 8
    apply_GS: bool = False
    init_weights: bool = True

    def __post_init__(self):
        super().__post_init__()
        check_rank("r", self.r)

    def with_rank(self, rank):
        return super().with_rank(rank) if self.apply_GS else replace(self, r=rank)


class HRA(InputMap):
    name = "HRA"
    refuses = NO_INPUTS
    Config = HRAConfig

    def check(self, target, config):
        n = patch_size(target)
        if config.apply_GS and config.r > n:
            return f"apply_GS: r={config.r} directions cannot be independent in {n} input features; nearest valid: {n}"
        return None

    def tensors(self, target, config):
        experts = target.shape[:-2] if target.experts else ()
        paired = config.init_weights and config.r % 2 == 0 and not config.apply_GS
        shape, start = (*experts, patch_size(target), config.r), pairs if paired else columns
        pad = () if config.apply_GS else ((len(shape) - 1, 1),)  # a column of zeros reflects nothing
        return {"hra_u": Tensor(shape, start, "hra_u", pad=pad)}

    def neutral(self, target, config):
        return None if config.apply_GS else {"hra_u": 0.0}

    def literals(self, target, config):
        return (config.apply_GS,)

    def map_input(self, x, theta, target, config):
        L, R = reflections(theta["hra_u"], config.apply_GS)
        return x - (x @ R) @ L.mT

    def weight(self, W, b, theta, target, config):
        L, R = reflections(theta["hra_u"], config.apply_GS)
        flat = W.flatten(1) if target.kernel else W
        return (flat - (flat @ L) @ R.mT).reshape(W.shape), b


def reflections(U: torch.Tensor, orthogonalise: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """L, R (..., n, r) with H(u_1) ... H(u_r) = I - L Rᵀ."""
    wide = single(U)
    if orthogonalise:
        Q = torch.linalg.qr(wide).Q.to(U.dtype)
        return 2 * Q, Q
    wide = F.normalize(wide, dim=-2)
    inverse = (wide.mT @ wide).triu(1) + identity_like(wide.mT @ wide) / 2
    L = torch.linalg.solve_triangular(inverse, wide, upper=True, left=False)
    return L.to(U.dtype), wide.to(U.dtype)


def columns(tensor, W=None):
    each(kaiming, tensor) if tensor.dim() > 2 else kaiming(tensor)


def pairs(tensor, W=None):
    half = tensor.new_empty(*tensor.shape[:-1], tensor.shape[-1] // 2)
    columns(half)
    tensor.copy_(half.repeat_interleave(2, dim=-1))
