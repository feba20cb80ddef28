"""The weight seen as a matrix, or as one matrix per expert: (experts?, out, in / groups * kernel...)."""

from __future__ import annotations

import math
from functools import partial

import torch

from ..target import Target
from .inits import each


def experts(target: Target) -> tuple[int, ...]:
    """Leading axes of tensors that each expert has of its own."""
    return () if target.experts is None else (target.experts,)


def per_expert(initialise, target: Target):
    """An initialiser of matrices, for one matrix or for a stack of them."""
    return initialise if target.experts is None else partial(each, initialise)


def columns(target: Target) -> int:
    """Columns of the weight seen as a matrix: the patch on convolutions."""
    return math.prod(target.shape[len(experts(target)) + 1 :])


def as_matrix(W: torch.Tensor, target: Target) -> torch.Tensor:
    return W.flatten(-1 - len(target.kernel)) if target.kernel else W


def nearest_divisor(wanted: int, size: int) -> int:
    """The divisor of `size` nearest to `wanted`."""
    return min((d for d in range(1, size + 1) if size % d == 0), key=lambda d: abs(d - wanted))
