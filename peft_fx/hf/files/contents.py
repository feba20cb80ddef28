"""What the files of an adapter hold: the model's own tensors, or those of a state dict that somebody gathered from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import cast

import torch
from torch import fx

from ...config import AdapterConfig
from ...engine.filing import adapter_files
from ...store.modules import derive
from ...store.state import state_of
from ...store.tensors import ADAPTERS, set_tensor
from ...training.adalora import RankAllocator
from ..model.tuner import CHILD, IN_MODEL, Tuner
from .embeddings import embedding_tensors


def adapter_contents(
    tuner: Tuner,
    adapter: str,
    save_embedding_layers: bool | str = "auto",
    state_dict: Mapping[str, torch.Tensor] | None = None,
) -> tuple[AdapterConfig, dict]:
    """(config, file key -> tensor) of an adapter's files: of what training has left of it.

    state_dict: of the whole model, where its own tensors are shards. Raises ValueError if it lacks the adapter's.
    """
    gm: fx.GraphModule = tuner.backend.adapters
    if state_dict is not None:
        gm = holding(gm, state_dict, adapter)
    allocator = tuner.allocators.get(adapter)
    shrunk = isinstance(allocator, RankAllocator) and allocator.rank_pattern
    config, tensors = cast(RankAllocator, allocator).files(gm) if shrunk else adapter_files(gm, adapter)
    config = tuner.peft_config.edited(adapter, config)
    if config.task_type is None:  # for AutoPeftModel
        kind = type(tuner.model)
        config = replace(config, auto_mapping={"base_model_class": kind.__name__, "parent_library": kind.__module__})
    return config, tensors | embedding_tensors(tuner, adapter, save_embedding_layers, state_dict)


def holding(gm: fx.GraphModule, state_dict: Mapping[str, torch.Tensor], adapter: str) -> fx.GraphModule:
    """A module like `gm` that has the adapter's tensors from the state dict of a model."""
    places = [f"{place}{adapter}." for place in (IN_MODEL, f"{CHILD}.")]
    given = {k[len(p) :]: t for p in places for k, t in state_dict.items() if k.startswith(p)}
    if not given:
        raise ValueError(
            f"the state dict has no key that begins with {' or '.join(places)}: expected model.state_dict()"
        )
    new = derive(gm, fx.Graph(), state_of(gm))
    for name, tensor in given.items():
        set_tensor(new, f"{ADAPTERS}.{adapter}.{name}", tensor)
    return new
