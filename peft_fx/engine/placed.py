"""Tensors of placements in their modules, with what follows from the config marked as such."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from ..planning.plan import Placement
from ..store.resident import Adapter, Derived, adapter_of
from ..store.tensors import ADAPTERS, get_tensor, kept_of, set_tensor, store_of


def put(gm: fx.GraphModule, p: Placement, name: str, tensor: torch.Tensor) -> None:
    """Registers a tensor of a placement's own: a Parameter as parameter, others as buffers."""
    set_tensor(gm, f"{ADAPTERS}.{p.state_name(name)}", tensor, persistent=not p.tensors[name].derived)


def describe(gm: fx.GraphModule, placements: Iterable[Placement]) -> None:
    """Notes how derived tensors are made, from now on."""
    for p in placements:
        adapter: Adapter = adapter_of(store_of(gm).adapters, p.adapter)
        base = kept_of(gm, p.target.name).dtype
        for name, spec in p.tensors.items():
            if spec.derived and name not in p.shared:
                adapter.derived[p.state_name(name).partition(".")[2]] = Derived(spec, base)


def adopt(gm: fx.GraphModule, placements: Iterable[Placement]) -> None:
    """Makes tensors that a file's program brought what `put` makes them."""
    for p in placements:
        for name in p.tensors.keys() - p.shared.keys():
            if (tensor := get_tensor(gm, f"{ADAPTERS}.{p.state_name(name)}")) is not None:
                put(gm, p, name, tensor)
        describe(gm, [p])
