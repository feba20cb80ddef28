"""Grids: one number for each block of a weight, as most schemes keep their scales.

block: the size of a block along each axis. The last block of an axis may be cut; a grid with one entry along an axis broadcasts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional as F

from ..kernels.packed import Tensors
from .base import Storage
from .formats import Format


def spread(grid: torch.Tensor, block: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
    """The number of each element's block: shape, or 1 along the axes on which it broadcasts."""
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


def gathered(storage: Storage, tensors: Tensors, ids: torch.Tensor, f: Format) -> torch.Tensor:
    """W[ids], where row i of W (out, in) is made of row i of each tensor."""
    chosen = ids.reshape(-1)
    part = Format(f.scheme, (chosen.numel(), f.shape[1]), f.dtype, f.facts)
    return storage.dequantize([t.index_select(0, chosen) for t in tensors], part).reshape(*ids.shape, f.shape[1])
