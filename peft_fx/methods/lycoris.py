"""What LoHa and LoKr share, as in LyCORIS (Yeh et al. 2023, arXiv 2309.14859).

    W' = W + s dW(theta),  s = alpha / r        dW: the update, as a matrix (out, in / groups * kernel)

While training, W' = W + k R s dW: rank_dropout zeroes rows of dW (R), module_dropout the whole update (k). Where LoHa's R
keeps no row, PEFT divides 0 by the mean 0; here such an update is zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F

from ..config import LORA_ONLY, AdapterConfig, by_pattern, check_rank, pattern_field
from ..errors import RecipeError
from .base import Method


@dataclass(frozen=True)
class LycorisConfig(AdapterConfig):
    absent = LORA_ONLY | {"bias"}

    rank_pattern: dict = pattern_field()
    alpha_pattern: dict = pattern_field()
    r: int = 8
    alpha: float = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False

    def __post_init__(self):
        super().__post_init__()
        for what, rank in {"r": self.r, **{f"rank_pattern[{k!r}]": v for k, v in self.rank_pattern.items()}}.items():
            check_rank(what, rank)
        for what in ("rank_dropout", "module_dropout"):
            if not 0.0 <= getattr(self, what) < 1.0:
                raise RecipeError(f"{what}: expected 0 <= p < 1, got {getattr(self, what)!r}")

    def with_rank(self, rank):
        return replace(self, r=rank, rank_pattern={})


class Lycoris(Method):
    """Gives `weight` from `update`."""

    refuses = {"norm": "{name} factors matrices; this weight has shape {shape}"}

    def update(self, theta, target, config) -> torch.Tensor:
        """s dW: (experts?, out, in / groups * kernel)."""
        raise NotImplementedError

    def literals(self, target, config):
        return config.rank_dropout, config.module_dropout

    def rank(self, target, config) -> int:
        return by_pattern(config.rank_pattern, target.pattern_path, config.r)

    def scaling(self, target, config) -> float:
        return by_pattern(config.alpha_pattern, target.pattern_path, config.alpha) / self.rank(target, config)

    def effective(self, target, config) -> bool:
        """Whether a convolution's kernel has a core tensor; pointwise ones are matrices."""
        return config.use_effective_conv2d and math.prod(target.kernel) > 1

    def mean_scaled(self, config) -> bool:
        """Whether rank_dropout divides the rows that it keeps by their share."""
        return True

    def weight(self, W, b, theta, target, config):
        return W + self.update(theta, target, config).reshape(W.shape), b

    def training_weight(self, W, b, theta, target, config):
        dW = self.update(theta, target, config)
        return W + self.dropped(dW.mT, target, config).mT.reshape(W.shape), b

    def dropped(self, y: torch.Tensor, target, config) -> torch.Tensor:
        """(..., out) with one mask for all rows, or one each for experts."""
        rows = (*target.shape[:1], 1) if target.experts else ()
        if config.rank_dropout:
            mask = kept(y, (*rows, target.out_features), config.rank_dropout)
            if self.mean_scaled(config):
                mask = mask / mask.mean(-1, keepdim=True).clamp(min=1 / target.out_features)
            y = y * mask
        return y * kept(y, (*rows, 1), config.module_dropout) if config.module_dropout else y


def core_shape(r: int, target) -> tuple[int, ...]:
    """(r, r, *kernel); PEFT files a Conv1d's with a further axis."""
    return (r, r, *target.kernel, 1) if len(target.kernel) == 1 else (r, r, *target.kernel)


def with_core(t: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """P[p, q, *k] = sum_ij t[i, j, *k] a[i, p] b[j, q]."""
    return torch.einsum("ij...,ip,jq->pq...", t, a, b)


def kept(x: torch.Tensor, shape: tuple[int, ...], p: float) -> torch.Tensor:
    """Numbers of this shape: 0 with probability p while training, else 1."""
    return (F.dropout(x.new_ones(shape), p, True) > 0).to(x.dtype)
