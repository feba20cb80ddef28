"""Parameters of a module for which an adapter's own stand: whoever reads `lm_head.weight` gets the one that is trained.

The base's Parameter stays where it is, in `_parameters`: state dicts, the module's graphs and merges see it there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ...passes.forms.lowering import weight_function
from ...planning.plan import Placement
from ..hosts.raw import is_raw
from ..hosts.traced import held
from .layer import Layer

FSDP_MARK = "_fsdp_flattened"
TRAINED = "_peft_fx_trained"  # where an adapted module has: parameter name -> what is read in its place, or nothing


class Reading:
    """The numbers of the placements of one parameter, the last of which decides unless it has rows alone."""

    def __init__(self, layer: Layer, placements: tuple[Placement, ...]):
        self.layer, self.placements = layer, placements
        self.find()

    def __getstate__(self) -> dict:
        return {"layer": self.layer, "placements": self.placements}  # a copy finds its own tensors when it is read

    def find(self) -> None:
        layer = self.layer
        self.base = held(layer.module, self.placements[0].target.parameter)
        self.steps = [(function_of(p), [held(*layer.place(p, name)) for name in p.tensors]) for p in self.placements]

    def __call__(self) -> torch.Tensor:
        if "steps" not in self.__dict__:
            self.find()
        value = self.base.tensor
        for function, tensors in self.steps:
            value, _ = function(value, None, *[one.tensor for one in tensors])
        return value


def function_of(p: Placement) -> Callable:
    return weight_function(p.rule, p.target, p.config, tuple(p.tensors), p.rule.weight)


def is_a_shard(kept: dict, name: str, own: torch.Tensor) -> bool:
    """Whether FSDP 1 looks after the parameter, which it reads this way itself, and has not gathered it for a call."""
    return name not in kept and getattr(own, FSDP_MARK, False)


def own_or_base(name: str) -> property:
    """The parameter of this name while no adapter acts that has its own; else that one."""

    def read(self: nn.Module) -> torch.Tensor | None:
        kept = self.__dict__
        if name in kept:  # while a forward runs, FSDP 1 has the gathered tensors among the attributes
            own = kept[name]
        elif name in kept["_parameters"]:
            own = kept["_parameters"][name]
        else:
            raise AttributeError(name)
        trained: dict[str, Reading] = kept.get(TRAINED, {})
        if name in trained and not is_raw() and not is_a_shard(kept, name, own):
            return trained[name]()
        return own

    def write(self: nn.Module, value: Any) -> None:
        self.__dict__[name] = value

    def delete(self: nn.Module) -> None:
        self.__dict__.pop(name)

    return property(read, write, delete)
