"""The tensors of adapters by what they are, from whatever holds them: a graph, a PeftModel, an injected model, a backend."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx, nn

from ...planning.plan import Placement
from ...store.state import state_of
from ...store.tensors import ADAPTERS, get_tensor
from ...store.unwrap import unwrapped
from ...verbs.backend import Backend
from .tuner import tuner_of

FACTORS = (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"))


@dataclass(frozen=True)
class Owned:
    """One tensor of an adapter. name: what its placement calls it, e.g. "lora_A"."""

    name: str
    tensor: torch.Tensor
    placement: Placement

    @property
    def path(self) -> str:
        """<adapter>.<target>.<name>, as `named_parameters` ends."""
        return self.placement.state_name(self.name)


def adapters_of(model) -> fx.GraphModule:
    """The graph module that holds the adapters. Raises GraphError or TypeError where there are none."""
    model = unwrapped(model)
    if isinstance(model, Backend):
        return model.adapters
    if isinstance(model, fx.GraphModule):
        state_of(model)
        return model
    return tuner_of(model).backend.adapters


def tensors_of(model) -> list[Owned]:
    """All tensors of all adapters, each once: by the placement that owns it."""
    gm = adapters_of(model)
    state = state_of(gm)
    return [
        Owned(name, get_tensor(gm, f"{ADAPTERS}.{p.state_name(name)}"), p)
        for adapter in state.recipe
        for p in state.recipe[adapter].placements
        for name in p.tensors
        if name not in p.shared
    ]


def parameters_of(model) -> list[Owned]:
    """Those that an optimiser may get, whether or not they require grad now."""
    return [t for t in tensors_of(model) if isinstance(t.tensor, nn.Parameter)]


def pairs_of(owned: list[Owned]) -> list[tuple[Owned, Owned]]:
    """(A, B) of every target whose update is a product of LoRA's two factors."""
    found = {t.path: t for t in owned}
    pairs = ((t, found.get(t.placement.state_name(b))) for a, b in FACTORS for t in owned if t.name == a)
    return [(A, B) for A, B in pairs if B is not None]
