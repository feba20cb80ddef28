"""The tensors of adapters by what they are, from whatever holds them: a graph, a PeftModel, an injected model, a backend."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx, nn

from ..errors import NoAdaptersError
from ..planning.plan import Placement
from ..store.state import state_of
from ..store.tensors import ADAPTERS, get_tensor
from ..store.unwrap import unwrapped
from .backend import Backend

INJECTED = "_peft_fx_tuner"  # where a model keeps the tuner that was injected into it
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
    """The graph module that holds the adapters. Raises GraphError or NoAdaptersError where there are none."""
    model = unwrapped(model)
    if isinstance(model, fx.GraphModule):
        state_of(model)
        return model
    return model.adapters if isinstance(model, Backend) else vars(holder_of(model))["backend"].adapters


def holder_of(model):
    """What holds the backend of a PeftModel, or of a model that adapters were injected into: its tuner."""
    model = unwrapped(model)
    found = (model, getattr(model, "_modules", {}).get("base_model"), vars(model).get(INJECTED))
    holder = next((h for h in found if h is not None and isinstance(vars(h).get("backend"), Backend)), None)
    if holder is None:
        raise no_adapters(model)
    return holder


def no_adapters(model) -> NoAdaptersError:
    return NoAdaptersError(
        f"expected a PeftModel, or a model that adapters were injected into, got a {type(model).__name__} without: "
        "get_peft_model, PeftModel.from_pretrained or inject_adapter_in_model give it some"
    )


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
