"""`Layer`: what is known of one adapted module: which adapters are on it, with what."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from ...planning.plan import Placement
from ...store.tensors import ADAPTERS, owner_of

ATTRIBUTE = "_peft_fx_layer"  # where an adapted module has its Layer


@dataclass
class Layer:
    """Of one module. placed: adapter -> its method's placements on it; saved: the adapters that train the module whole."""

    tuner: nn.Module  # a Tuner, which imports this
    path: str
    placed: dict[str, list[Placement]] = field(default_factory=dict)
    saved: tuple[str, ...] = ()

    @property
    def module(self) -> nn.Module:
        return self.tuner.model.get_submodule(self.path)

    @property
    def acting(self) -> tuple[str, ...]:
        """The adapters that act in the module's calls now, in order."""
        return tuple(name for name in self.tuner.backend.active if name in self.placed or name in self.saved)

    def place(self, p: Placement, name: str) -> tuple[nn.Module, str]:
        """The module that holds a placement's tensor, and the tensor's name in it."""
        return owner_of(self.tuner.backend.adapters, f"{ADAPTERS}.{p.resolve(name).name}")

    def put(self, values: dict[torch.Tensor, torch.Tensor]) -> None:
        """Other numbers into tensors of adapters."""
        self.tuner.backend.adapters.peft_fx.sharing.put(values)


def layer_of(module: nn.Module) -> Layer:
    return module.__dict__[ATTRIBUTE]
