"""Verbs that add, choose, write and remove adapters. Each returns a new GraphModule and leaves its input usable."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import fx

from ..atomic import StrPath
from ..engine.adding import with_adapter
from ..engine.derive import derived
from ..engine.filing import adapter_files
from ..engine.transitions import activated, refuse_merged, refuse_slots
from ..files.paths import as_path
from ..files.read import read_adapter
from ..files.write import write_adapter
from ..recipe import as_recipe
from ..store.lazy import copy_graph
from ..store.modules import reading
from ..store.state import base_of, state_of


def apply(
    graph: fx.GraphModule, recipe: Any, adapter_name: str = "default", *, lowering: str = "auto"
) -> fx.GraphModule:
    """Adds the adapters of a recipe and makes them active, after those that already are.

    recipe: a config, a Recipe, a dict, a path to .json / .yaml, or a PEFT config object. adapter_name: the name of a
    single config's adapter. lowering: the form in which the methods enter the graph, "activation" or "weight"; "auto"
    takes the activation form where there is one, unless the weight form is counted to be much cheaper at the captured sizes.
    The base's parameters are frozen in the result only: the model keeps its requires_grad.

    Raises RecipeError if nothing matches or a target is refused; then nothing has changed.
    """
    recipe = as_recipe(recipe, adapter_name)
    gm = graph
    for name, config in recipe.items():
        gm = with_adapter(gm, name, config, None, trainable=True, activate=True, lowering=lowering)
    return derived(gm, state_of(gm))


def load_adapter(
    graph: fx.GraphModule,
    path: StrPath,
    adapter_name: str = "default",
    *,
    trainable: bool = False,
    lowering: str = "auto",
) -> fx.GraphModule:
    """Adds an adapter from PEFT's files (a folder, or a Hub repository id), or from a LoRA file of diffusers' or kohya-ss's.

    It becomes active if no adapter is; else it stays resident until `set_adapter`, as in PEFT.
    trainable: whether its tensors require grad. lowering: as for `apply`. Raises AdapterFileError for files that cannot be
    read or do not fit.
    """
    state = state_of(graph, "load_adapter")
    config, tensors = read_adapter(path, state.table)
    source = (tensors, str(path))
    gm = with_adapter(graph, adapter_name, config, source, trainable, activate=not state.active, lowering=lowering)
    return derived(gm, state_of(gm))


def set_adapter(tuned: fx.GraphModule, names: str | list[str]) -> fx.GraphModule:
    """The graph with exactly these adapters active, composed in the order given; inactive adapters cost nothing.

    Raises GraphError for names that are not resident, merged graphs and those with slots, where `switch` does it.
    """
    state = state_of(tuned, "set_adapter")
    refuse_merged(state, "set_adapter")
    refuse_slots(state, "set_adapter", "which adapters act is data there, peft_fx.switch(graph, names) writes it")
    return derived(tuned, activated(state, names))


@contextlib.contextmanager
def disable_adapter(tuned: fx.GraphModule) -> Iterator[fx.GraphModule]:
    """Inside the block `tuned` itself runs the base graph; afterwards its own graph again, the same object.

    A compiled `tuned` recompiles once on each side. Not thread-safe: other threads see the base graph too.
    """
    state = state_of(tuned, "disable_adapter")
    refuse_merged(state, "disable_adapter")
    adapted = tuned.graph
    tuned.graph = copy_graph(base_of(state).graph)
    try:
        yield tuned
    finally:
        tuned.graph = adapted


def save_adapter(tuned: fx.GraphModule, path: StrPath, adapter_name: str | None = None) -> Path:
    """Writes one adapter as PEFT's `adapter_config.json` and `adapter_model.safetensors`, atomically; returns the folder.

    adapter_name may be left out when there is one adapter, or one active.
    """
    state_of(tuned, "save_adapter")
    with reading(tuned):
        return write_adapter(as_path(path, "a folder to write the adapter to"), *adapter_files(tuned, adapter_name))
