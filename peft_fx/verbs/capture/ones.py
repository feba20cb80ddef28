"""Examples without sizes of 1, which torch.export would fix: it takes 0 and 1 for properties of a call, not for sizes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils import _pytree as pytree


def wider(args: tuple, kwargs: dict) -> Iterator[tuple[tuple[int, ...], tuple, dict]]:
    """The example repeated along axes on which tensors have size 1: along all of them, then each alone. (axes, args, kwargs).

    An axis stands for all tensors that have size 1 there. The first one is left out where other tensors have more rows: there
    1 means any number of them.
    """
    leaves, spec = pytree.tree_flatten((args, kwargs))
    shapes = [leaf.shape for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.dim()]
    axes = sorted({axis for shape in shapes for axis, size in enumerate(shape) if size == 1})
    if any(shape[0] != 1 for shape in shapes):
        axes = [axis for axis in axes if axis]
    taken = {size for shape in shapes for size in shape}
    sizes = dict(zip(axes, (size for size in range(2, 99) if size not in taken), strict=False))
    for chosen in dict.fromkeys([tuple(axes), *((axis,) for axis in axes)]):
        if chosen:
            larger = [repeated(leaf, {axis: sizes[axis] for axis in chosen}) for leaf in leaves]
            yield chosen, *pytree.tree_unflatten(larger, spec)


def repeated(leaf: Any, sizes: dict[int, int]) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    times = [sizes.get(axis, 1) if size == 1 else 1 for axis, size in enumerate(leaf.shape)]
    return leaf if max(times, default=1) == 1 else leaf.detach().repeat(times)
