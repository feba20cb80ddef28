"""Wider tensors for adapters, zeros in what is new."""

from __future__ import annotations

import torch
from torch import fx, nn

from ..config import AdapterConfig
from ..errors import HotswapError
from ..store.modules import derive
from ..store.resident import adapter_of
from ..store.state import State
from ..store.tensors import store_of
from ..target import sizes
from .fitting import by_place, fitted, planned, slots_of
from .placed import put


def widened(tuned: fx.GraphModule, state: State, max_rank: int | None) -> fx.GraphModule:
    """The module, not yet its graph, with adapter tensors and residents of its own; None: with the ranks that they have."""
    recipe = {name: r.update(room=r.room and wide(r.room, max_rank), home=object()) for name, r in state.recipe.items()}
    state = state.update(recipe=recipe)
    new = derive(tuned, fx.Graph(), state)
    for adapter, resident in state.recipe.items():
        tree = adapter_of(store_of(new).adapters, adapter)
        tree.derived = dict(tree.derived)
        slots = slots_of(tuned, adapter)
        larger = by_place(planned(state, adapter, wide(resident.config, max_rank)).placements)
        for place, p in by_place(resident.placements).items():
            for name, spec in p.tensors.items():
                if name in p.shared:
                    continue
                tensor = slots[p.state_name(name)]
                shape = larger[place].tensors[name].shape if spec.pad and max_rank else tuple(tensor.shape)
                padded = fitted(tensor.detach(), torch.empty(shape, device="meta"), spec.pad)
                if padded is None:
                    raise HotswapError(
                        f"{p.target.name}.{name}: shape {sizes(tensor.shape)} is larger than max_rank={max_rank}"
                    )
                own = padded.clone()
                if isinstance(tensor, nn.Parameter):
                    own = nn.Parameter(own, requires_grad=tensor.requires_grad)
                put(new, p, name, own)
    return new


def wide(config: AdapterConfig, max_rank: int | None) -> AdapterConfig:
    return config if max_rank is None else config.with_rank(max_rank)
