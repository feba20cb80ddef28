"""`Layer`: what is known of one adapted module: which adapters are on it, with what."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn

from ...planning.matching import inside
from ...planning.plan import Placement
from ...store.tensors import ADAPTERS, owner_of, tensor_of

if TYPE_CHECKING:
    from ..model.tuner import Tuner

ATTRIBUTE = "_peft_fx_layer"  # where an adapted module has its Layer
SUBSTITUTES = {"SAVED": None, "TOKENS": "tokens"}  # method -> what a module with it is besides, if anything


@dataclass
class Layer:
    """Of one module. placed: adapter -> its method's placements on it; saved: the adapters that train the module whole.

    rescaled: a scale was written since the module was merged.
    """

    tuner: Tuner
    path: str
    placed: dict[str, list[Placement]] = field(default_factory=dict)
    saved: tuple[str, ...] = ()
    rescaled: bool = False

    @property
    def module(self) -> nn.Module:
        return self.tuner.model.get_submodule(self.path)

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters that are on the module."""
        return tuple(dict.fromkeys((*self.placed, *self.saved)))

    @property
    def acting(self) -> tuple[str, ...]:
        """Those that act in the module's calls now, in order."""
        return tuple(name for name in self.tuner.backend.active if name in self.names)

    def updates(self, adapter: str) -> list[Placement]:
        """What of the adapter changes the module's own numbers, not stands for them."""
        return [p for p in self.placed.get(adapter, ()) if p.method not in SUBSTITUTES]

    def substitutes(self, adapter: str) -> list[Placement]:
        return [p for p in self.placed.get(adapter, ()) if p.method in SUBSTITUTES]

    def inside(self, adapter: str) -> list[Placement]:
        """The adapter's placements on the module; where it is trained whole, on the modules in it too."""
        if adapter not in self.saved:
            return self.placed.get(adapter, [])
        return [p for p in self.tuner.state.recipe[adapter].placements if inside(p.target.path, self.path)]

    def tensor(self, p: Placement, name: str) -> torch.Tensor:
        shared = p.resolve(name)
        tensor = tensor_of(self.tuner.backend.adapters, f"{ADAPTERS}.{shared.name}")
        return tensor.mT if shared.transposed else tensor

    def place(self, p: Placement, name: str) -> tuple[nn.Module, str]:
        """The module that holds a placement's tensor, and the tensor's name in it."""
        return owner_of(self.tuner.backend.adapters, f"{ADAPTERS}.{p.resolve(name).name}")

    def put(self, values: dict[torch.Tensor, torch.Tensor]) -> None:
        """Other numbers into tensors of adapters."""
        self.tuner.backend.adapters.peft_fx.sharing.put(values)


def layer_of(module: nn.Module) -> Layer:
    return module.__dict__[ATTRIBUTE]
