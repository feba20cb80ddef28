"""What an adapter has to be written to files."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import fx

from ..config import AdapterConfig
from ..errors import GraphError, RecipeError
from ..files.write import file_config
from ..methods.padding import crop_to
from ..planning.plan import Placement
from ..planning.selection import resolved_target_modules
from ..store.state import State, state_of
from ..store.tensors import ADAPTERS, tensor_of
from .transitions import names_of, planned


def adapter_files(
    tuned: fx.GraphModule, adapter_name: str | None = None
) -> tuple[AdapterConfig, dict[str, torch.Tensor]]:
    """What `save_adapter` writes: the config, and file key -> tensor."""
    state = state_of(tuned, "save_adapter")
    name = only_adapter(state) if adapter_name is None else names_of(state, adapter_name)[0]
    plan = planned(state, name, state.recipe[name].config)
    tensors: dict[str, torch.Tensor] = {}
    for placement, tensor_name, keys in plan.filed:
        found: Sequence[torch.Tensor] = [filed(tuned, placement, tensor_name)]
        if pieces := placement.tensors[tensor_name].pieces:
            found = pieces.split(*found, *(filed(tuned, placement, other) for other in pieces.reads))
        tensors |= zip(keys, found, strict=True)
    return filed_config(state, name), tensors


def filed_config(state: State, name: str) -> AdapterConfig:
    """An adapter's config as files say it."""
    config = state.recipe[name].config
    plan = planned(state, name, config)
    if config.base_model_name_or_path is None and state.table.name_or_path:
        config = dataclasses.replace(config, base_model_name_or_path=state.table.name_or_path)
    # Default targets are written out, as PEFT does: SGLang reads the names from here. A regex, which the defaults of a few
    # models are, cannot stand beside layers_to_transform; there readers apply the default again.
    names = resolved_target_modules(state.table, config)
    if not isinstance(names, str) or config.layers_to_transform is None:
        config = dataclasses.replace(config, target_modules=names)
    return file_config(config, plan)


def filed(tuned: fx.GraphModule, placement: Placement, name: str) -> torch.Tensor:
    """A tensor as files hold it: as the target's own, and without what its slot has beyond the adapter's rank."""
    spec, shared = placement.tensors[name], placement.resolve(name)
    tensor = tensor_of(tuned, f"{ADAPTERS}.{shared.name}").detach()
    tensor = tensor.t() if shared.transposed else tensor
    cropped = crop_to(tensor, spec.shape, spec.pad)
    if cropped.shape != tensor.shape and cropped.count_nonzero() != tensor.count_nonzero():
        raise GraphError(
            f"{placement.target.name}: {name} holds numbers beyond the adapter's rank, where a hotswap wrote zeros: the "
            "optimiser still had the momentum of the adapter before; clear optimizer.state after a swap. Nothing was written"
        )
    return cropped


def only_adapter(state: State) -> str:
    for places in (tuple(state.residents.values()), state.acting):
        if len(places) == 1:
            return places[0]
    raise RecipeError(f"which adapter? Give adapter_name, one of: {', '.join(state.residents) or 'none resident'}")
