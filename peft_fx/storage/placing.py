"""Other numbers in the place of a module's, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn


def exchange(module: nn.Module, new: Mapping[str, torch.Tensor]) -> Callable[[], None]:
    """Puts tensors where a module has its own, by their names; returns what puts back the objects that were there."""
    slots: dict[str, dict[str, Any]] = {
        name: module._parameters if name in module._parameters else module._buffers for name in new
    }
    before = {name: held[name] for name, held in slots.items()}
    for name, tensor in new.items():
        frozen = slots[name] is module._parameters
        slots[name][name] = nn.Parameter(tensor, requires_grad=False) if frozen else tensor

    def undo() -> None:
        for name, old in before.items():
            slots[name][name] = old

    return undo


def rebuilt(outer: Any, inner: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """A tensor subclass like `outer` around other inner tensors; those that are not named stay."""
    names, context = outer.__tensor_flatten__()
    tensors = {name: inner.get(name, getattr(outer, name)) for name in names}
    return type(outer).__tensor_unflatten__(tensors, context, outer.shape, outer.stride())
