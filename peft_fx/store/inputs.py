"""What a call must have in common with the captured one, checked by a node of the graph (`passes/capture/inputs.py`)."""

from __future__ import annotations

import torch
from torch import nn

from ..errors import GraphError
from ..target import sizes


class FixedInputs(nn.Module):
    """Raises GraphError for a call that differs from the captured one in what capture fixed.

    expected: per argument its name and a tensor's sizes, None where they may vary, or the constant that was given.
    """

    _is_impure = True  # torch.fx: not dead code, though no node reads it

    def __init__(self):
        super().__init__()
        self.expected: tuple[tuple[str, object], ...] = ()

    def forward(self, *values):
        for value, (name, expected) in zip(values, self.expected, strict=True):
            if not isinstance(value, torch.Tensor):
                fits = value is expected or value == expected
            elif fits := isinstance(expected, tuple) and len(expected) == value.dim():
                for given, wanted in zip(value.shape, expected, strict=True):
                    fits = fits and (wanted is None or given == wanted)
            if not fits:
                raise GraphError(misfit(name, expected, value))


def misfit(name: str, expected, value) -> str:
    """What was captured, what came, which axes of a tensor differ, and what to do."""
    if not isinstance(value, torch.Tensor) or not isinstance(expected, tuple):
        given = sizes(value.shape) if isinstance(value, torch.Tensor) else repr(value)
        return f"captured with {name} = {expected!r}, called with {given}: capture the model with this input"
    shape = sizes("any" if size is None else size for size in expected)
    text = f"captured with {name} = {shape}, called with {sizes(value.shape)}"
    if len(expected) != value.dim():
        return f"{text}: capture the model with this input"
    axes = [axis for axis, size in enumerate(expected) if size not in (None, value.shape[axis])]
    ones = [axis for axis in axes if expected[axis] == 1]
    which = f"axis {', '.join(map(str, axes))} of {name} is fixed"
    if not ones:
        return f"{text}: {which} by the model's code or by dynamic_shapes; capture the model with this input"
    return f"{text}: {which}, since the example had size 1 there; capture with an example of size 2 or more"
