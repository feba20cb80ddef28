"""Verbs that add, choose, write and remove adapters. Each returns a new GraphModule and leaves its input usable."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import fx, nn

from ..config import AdapterConfig
from ..errors import GraphError, RecipeError
from ..files.match import match_tensors
from ..files.read import local_folder, read_config, read_tensors
from ..files.write import file_config, write_adapter
from ..methods.base import Tensor, crop_to
from ..passes.lowering import to_canonical
from ..planning.plan import Placement, make_plan
from ..recipe import as_recipe
from ..store import ADAPTERS, Resident, State, copy_graph, derive, get_tensor, set_tensor, state_of
from .derive import adapter_dtype, derived, frozen, names_of, placements, refuse_merged, replicated


def apply(graph: fx.GraphModule, recipe, adapter_name: str = "default") -> fx.GraphModule:
    """Adds the adapters of a recipe and makes them active, after those that already are.

    recipe: a config, a Recipe, a dict, a path to .json / .yaml, or a PEFT config object. adapter_name: the name of a
    single config's adapter. The base's parameters are frozen in the result only: the model keeps its requires_grad.

    Raises RecipeError if nothing matches or a target is refused; then nothing has changed.
    """
    recipe = as_recipe(recipe, adapter_name)
    gm = graph
    for name, config in recipe.items():
        gm = with_adapter(gm, name, config, None, trainable=True, activate=True)
    return derived(gm, state_of(gm))


def load_adapter(
    graph: fx.GraphModule, path, adapter_name: str = "default", *, trainable: bool = False
) -> fx.GraphModule:
    """Adds an adapter from PEFT's files (a folder, or a Hub repository id).

    It becomes active if no adapter is; else it stays resident until `set_adapter`, as in PEFT.
    trainable: whether its tensors require grad. Raises AdapterFileError for files that cannot be read or do not fit.
    """
    state = state_of(graph, "load_adapter")
    folder = local_folder(path)
    config = read_config(folder)
    gm = with_adapter(
        graph, adapter_name, config, (read_tensors(folder), str(path)), trainable, activate=not state.active
    )
    return derived(gm, state_of(gm))


def with_adapter(gm, name: str, config: AdapterConfig, source, trainable: bool, activate: bool) -> fx.GraphModule:
    """A graph module with one more resident adapter, not yet derived. source: (file's tensors, where) or None for init."""
    state = state_of(gm, "apply")
    refuse_merged(state, "adding an adapter")
    if name in state.recipe:
        raise RecipeError(f"there is an adapter {name!r} already; give another adapter_name, or use peft_fx.hotswap")
    only_one_with_biases(state, name, config)
    gm = derive(gm, fx.Graph(), state) if state.recipe else frozen(gm)
    if config.layer_replication:
        gm = replicated(gm, config.layer_replication)
        state = state_of(gm)
    plan = make_plan(state.table, name, config)
    for entry in plan.unmatched:
        warnings.warn(f"adapter {name!r}: {entry}", stacklevel=4)
    values = None if source is None else match_tensors(plan, source[0], where=source[1])
    for placement in plan.placements:
        allocate(gm, placement, values, trainable)
    active = (*state.active, name) if activate else state.active
    gm.meta["peft_fx"] = state.update(recipe={**state.recipe, name: Resident(config)}, active=active)
    return gm


def only_one_with_biases(state: State, name: str, config: AdapterConfig) -> None:
    other = next((n for n, r in state.recipe.items() if r.config.bias != "none"), None)
    if other and config.bias != "none":
        raise RecipeError(
            f"adapters {other!r} and {name!r} both train biases (bias={config.bias!r}); only one of them can"
        )


def allocate(gm: fx.GraphModule, placement: Placement, values: dict | None, trainable: bool) -> None:
    """Registers a placement's tensors, initialised or from a file."""
    base = get_tensor(gm, placement.target.name)
    for name, spec in placement.tensors.items():
        if name in placement.shared:
            continue
        tensor = empty_tensor(spec, base)
        state_name = placement.state_name(name)
        with torch.no_grad():
            if values is not None and spec.key is not None:
                tensor.copy_(values[state_name])
            else:
                initialise(tensor, gm, placement, spec, {})
        full = f"{ADAPTERS}.{state_name}"
        grad = trainable and tensor.is_floating_point()
        set_tensor(gm, full, nn.Parameter(tensor, requires_grad=grad) if spec.trainable else tensor)


def initialise(tensor: torch.Tensor, gm: fx.GraphModule, placement: Placement, spec: Tensor, newer: dict) -> None:
    """Writes where a tensor starts. newer: state name -> what will take the place of the adapter's own tensors."""
    weights = [to_canonical(get_tensor(gm, t.name).detach(), t) for t in spec.sources or (placement.target,)]
    needed = [placement.resolve(n).name for n in spec.needs]
    needed = [newer[n] if n in newer else get_tensor(gm, f"{ADAPTERS}.{n}").detach() for n in needed]
    spec.init(tensor, weights if spec.sources else weights[0], *needed)


def empty_tensor(spec: Tensor, base: torch.Tensor) -> torch.Tensor:
    """Memory for one tensor of an adapter of the weight `base`."""
    dtype = spec.dtype or (base.dtype if spec.like_base else adapter_dtype(base.dtype))
    return torch.empty(spec.shape, dtype=dtype, device=base.device)


def set_adapter(tuned: fx.GraphModule, names: str | list[str]) -> fx.GraphModule:
    """The graph with exactly these adapters active, composed in the order given; inactive adapters cost nothing."""
    state = state_of(tuned, "set_adapter")
    refuse_merged(state, "set_adapter")
    return derived(tuned, state.update(active=names_of(state, names)))


def delete_adapter(tuned: fx.GraphModule, name: str) -> fx.GraphModule:
    """The graph without an adapter; its tensors go when no other graph holds them."""
    state = state_of(tuned, "delete_adapter")
    refuse_merged(state, "delete_adapter")
    names_of(state, name)
    recipe = {n: r for n, r in state.recipe.items() if n != name}
    new = derived(tuned, state.update(recipe=recipe, active=tuple(n for n in state.active if n != name)))
    new.peft_fx.adapters._modules.pop(name, None)
    return new


@contextlib.contextmanager
def disable_adapter(tuned: fx.GraphModule) -> Iterator[fx.GraphModule]:
    """Inside the block `tuned` itself runs the base graph; afterwards its own graph again, the same object.

    A compiled `tuned` recompiles once on each side. Not thread-safe: other threads see the base graph too.
    """
    state = state_of(tuned, "disable_adapter")
    refuse_merged(state, "disable_adapter")
    adapted = tuned.graph
    tuned.graph = copy_graph(state.base.graph)
    try:
        yield tuned
    finally:
        tuned.graph = adapted


def save_adapter(tuned: fx.GraphModule, path, adapter_name: str | None = None) -> Path:
    """Writes one adapter as PEFT's `adapter_config.json` and `adapter_model.safetensors`, atomically; returns the folder.

    adapter_name may be left out when there is one adapter, or one active.
    """
    state = state_of(tuned, "save_adapter")
    name = only_adapter(state) if adapter_name is None else names_of(state, adapter_name)[0]
    config = state.recipe[name].config
    tensors = {}
    for placement in placements(state, name):
        for tensor_name, key, spec in placement.saved():
            shared = placement.resolve(tensor_name)
            tensor = get_tensor(tuned, f"{ADAPTERS}.{shared.name}").detach()
            tensor = tensor.t() if shared.transposed else tensor
            tensors[key] = crop_to(tensor, spec.shape, spec.pad)
            if tensors[key].shape != tensor.shape and tensors[key].count_nonzero() != tensor.count_nonzero():
                raise GraphError(
                    f"{key}: the slot holds numbers beyond the adapter's rank, where a hotswap wrote zeros: the optimiser "
                    "still had the momentum of the adapter before; clear optimizer.state after a swap. Nothing was written"
                )
    if config.base_model_name_or_path is None and state.table.name_or_path:
        config = dataclasses.replace(config, base_model_name_or_path=state.table.name_or_path)
    return write_adapter(Path(path), file_config(config, make_plan(state.table, name, config)), tensors)


def only_adapter(state: State) -> str:
    for names in (tuple(state.recipe), state.active):
        if len(names) == 1:
            return names[0]
    raise RecipeError(f"which adapter? Give adapter_name, one of: {', '.join(state.recipe) or 'none resident'}")
