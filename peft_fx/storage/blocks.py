"""Grids: one number for each block of a weight, as most schemes keep their scales.

block: the size of a block along each axis. The last block of an axis may be cut; a grid with one entry along an axis broadcasts,
as does one number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional as F

from .base import Storage
from .formats import Format


def spread(grid: torch.Tensor, block: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
    """The number of each element's block: shape, or what broadcasts to it."""
    if grid.numel() == 1:
        return grid.reshape([1] * len(shape))
    for axis, (size, width) in enumerate(zip(shape, block, strict=True)):
        if width > 1 and grid.shape[axis] > 1:
            grid = grid.repeat_interleave(width, axis)
            if grid.shape[axis] > size:
                grid = grid.narrow(axis, 0, size)
    return grid


def grid_of(W: torch.Tensor, block: Sequence[int], reduce: Callable[..., torch.Tensor]) -> torch.Tensor:
    """`reduce` (amax, amin) of each block. What a cut block lacks counts as 0."""
    beyond = [n for size, width in zip(W.shape, block, strict=True) for n in (-size % width, 0)]
    if any(beyond):
        W = F.pad(W, beyond[::-1])
    split = [n for size, width in zip(W.shape, block, strict=True) for n in (size // width, width)]
    return reduce(W.reshape(split), tuple(range(1, 2 * W.ndim, 2)))


def divisor(scale: torch.Tensor) -> torch.Tensor:
    """The scale, and 1 for a block of zeros, which some packages make NaN."""
    return torch.where(scale == 0, 1.0, scale)


class ByRows(Storage):
    """A scheme that can make chosen rows of a matrix alone: where each of its tensors has one for each row, or one number."""

    def rows(self, tensors, ids, f):
        if len(f.shape) != 2 or not all(t.numel() == 1 or t.shape[0] == f.shape[0] for t in tensors):
            return super().rows(tensors, ids, f)
        chosen = ids.reshape(-1)
        part = Format(f.scheme, (chosen.numel(), f.shape[1]), f.dtype, f.facts)
        own = [t if t.numel() == 1 else t.index_select(0, chosen) for t in tensors]
        return self.dequantize(own, part).reshape(*ids.shape, f.shape[1])
