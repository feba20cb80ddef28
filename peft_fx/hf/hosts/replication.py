"""`layer_replication` in a model itself: a deeper list of layers, of modules of their own over the same Parameters.

    layers' = layers[a_1:b_1] + layers[a_2:b_2] + ...        ranges [[a_1, b_1], [a_2, b_2], ...]

The model is changed in place, as PEFT does. What it had before waits in it for `shallow`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from ...config import AdapterConfig
from ...passes.capture.replicate import layer_list, sources
from ...planning.modules import module_table
from ...store.tensors import owner_of

SHALLOW = "_peft_fx_shallow"  # where a deeper model keeps what it was


@dataclass
class Shallow:
    """path: of the list of layers; fields: of the model's config, with their values."""

    path: str
    layers: nn.ModuleList
    fields: dict[str, Any]


def is_deeper(model: nn.Module) -> bool:
    return SHALLOW in model.__dict__


@contextmanager
def deeper(model: nn.Module, config: AdapterConfig) -> Iterator[None]:
    """The model with the layers that `config` asks for, if any. It keeps them unless the block raises.

    Raises RecipeError for ranges outside the model, and for a model without one list of layers.
    """
    try:
        if config.layer_replication:
            replicate(model, config.layer_replication)
        yield
    except BaseException:
        shallow(model)
        raise


def replicate(model: nn.Module, ranges: list[list[int]]) -> None:
    path = layer_list(module_table(model))
    layers = cast(nn.ModuleList, model.get_submodule(path))
    order = sources(ranges, len(layers))
    config = config_of(model, path)
    fields = {name: getattr(config, name) for name in ("num_hidden_layers", "layer_types") if hasattr(config, name)}
    new = nn.ModuleList(clone(layers[source], index) for index, source in enumerate(order))
    put(model, path, new.train(layers.training))
    model.__dict__[SHALLOW] = Shallow(path, layers, fields)
    if "num_hidden_layers" in fields:
        config.num_hidden_layers = len(order)
    if len(fields.get("layer_types") or ()) == len(layers):  # caches and masks are made by it
        config.layer_types = [config.layer_types[source] for source in order]


def clone(layer: nn.Module, index: int) -> nn.Module:
    """A layer with modules and buffers of its own and the Parameters of another. index: its place, by which caches know it."""
    new = copy.deepcopy(layer, {id(p): p for p in layer.parameters()})
    for module in new.modules():
        if hasattr(module, "layer_idx"):
            module.layer_idx = index  # type: ignore[assignment]  # a number
    return new


def shallow(model: nn.Module) -> None:
    """The layers and the config that the model had before it was made deeper."""
    kept: Shallow | None = model.__dict__.pop(SHALLOW, None)
    if kept is not None:
        put(model, kept.path, kept.layers.train(model.get_submodule(kept.path).training))
        config = config_of(model, kept.path)
        for name, value in kept.fields.items():
            setattr(config, name, value)


def put(model: nn.Module, path: str, layers: nn.ModuleList) -> None:
    owner, leaf = owner_of(model, path)
    setattr(owner, leaf, layers)


def config_of(model: nn.Module, path: str) -> Any:
    """The config of the innermost module around `path` that says how many layers there are; None if none does."""
    while path:
        path = path.rpartition(".")[0]
        config = getattr(model.get_submodule(path), "config", None)
        if hasattr(config, "num_hidden_layers"):
            return config
    return None
