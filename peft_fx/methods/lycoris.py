"""What LoHa and LoKr share, as in LyCORIS (Yeh et al. 2023, arXiv 2309.14859).

    W' = W + s dW(theta),  s = alpha / r        dW: the update, as a matrix (out, in / groups * kernel)

While training, W' = W + k R s dW: rank_dropout zeroes rows of dW (R), module_dropout the whole update (k). Where LoHa's R
keeps no row, PEFT divides 0 by the mean 0; here such an update is zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional as F

from ..checks import check_rank
from ..config import LORA_ONLY, AdapterConfig
from ..fields import pattern_field, probability, rank
from .base import Branch
from .scales import Ranked


@dataclass
class LycorisConfig(AdapterConfig):
    absent = LORA_ONLY | {"bias"}
    ranked = "r"
    rank_dropout_scale: ClassVar[bool] = True  # whether rank_dropout divides the rows that it keeps by their share

    rank_pattern: dict = pattern_field(check_rank)
    alpha_pattern: dict = pattern_field()
    r: int = rank(8)
    alpha: float = 8
    rank_dropout: float = probability(0.0)
    module_dropout: float = probability(0.0)
    use_effective_conv2d: bool = False


class Lycoris(Ranked, Branch):
    """Gives `weight` from `update`."""

    refuses = {"norm": "{name} factors matrices; this weight has shape {shape}"}
    written = ("rank_dropout", "rank_dropout_scale", "module_dropout")

    def update(self, theta, target, config) -> torch.Tensor:
        """s dW: (out, in / groups * kernel)."""
        raise NotImplementedError

    def effective(self, target, config) -> bool:
        """Whether a convolution's kernel has a core tensor; pointwise ones are matrices."""
        return config.use_effective_conv2d and math.prod(target.kernel) > 1

    def weight(self, W, b, theta, target, config):
        return W + self.update(theta, target, config).reshape(W.shape), b

    def training_weight(self, W, b, theta, target, config):
        dW = self.update(theta, target, config).reshape(W.shape).flatten(1)
        return W + self.dropped(dW.mT, target, config).mT.reshape(W.shape), b

    def dropped(self, y: torch.Tensor, target, config) -> torch.Tensor:
        """(..., out) with one mask for all rows."""
        if config.rank_dropout:
            mask = kept(y, target.out_features, config.rank_dropout)
            if config.rank_dropout_scale:
                mask = mask / mask.mean().clamp(min=1 / target.out_features)
            y = y * mask
        return y * kept(y, 1, config.module_dropout) if config.module_dropout else y


def core_shape(r: int, target) -> tuple[int, ...]:
    """(r, r, *kernel); PEFT files a Conv1d's with a further axis."""
    return (r, r, *target.kernel, 1) if len(target.kernel) == 1 else (r, r, *target.kernel)


def with_core(t: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """P[p, q, *k] = sum_ij t[i, j, *k] a[i, p] b[j, q]."""
    return torch.einsum("ij...,ip,jq->pq...", t, a, b)


def kept(x: torch.Tensor, size: int, p: float) -> torch.Tensor:
    """(size,): 0 with probability p while training, else 1."""
    return (F.dropout(x.new_ones(size), p, True) > 0).to(x.dtype)
