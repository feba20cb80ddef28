"""Verbs that add, choose, write and remove adapters. Each returns a new GraphModule and leaves its input usable."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import fx, nn

from ..config import AdapterConfig, refuse_to_begin
from ..errors import AdapterFileError, GraphError, RecipeError, UnmatchedWarning
from ..files.match import match_tensors
from ..files.paths import as_path
from ..files.read import read_adapter
from ..files.write import file_config, write_adapter
from ..methods.base import HALF, Tensor
from ..methods.padding import crop_to
from ..notices import warn
from ..passes.lowering import to_canonical
from ..planning.plan import Placement
from ..planning.selection import completed, resolved_target_modules
from ..recipe import as_recipe
from ..store import ADAPTERS, Resident, State, copy_graph, derive, get_tensor, state_of
from ..target import ModuleTable, Target
from .derive import derived, frozen, names_of, planned, refuse_merged, refuse_slots, replicated
from .placed import describe, put
from .residual import on_whole_base

LOWERINGS = ("auto", "activation", "weight")


class Source(NamedTuple):
    """Numbers for a new adapter: file key -> tensor, and where they are from.

    drawn: its tensors are initialised nevertheless, as PEFT's are, so that the generator goes on as it does there.
    """

    tensors: dict[str, torch.Tensor]
    where: str
    drawn: bool = False


def apply(graph: fx.GraphModule, recipe, adapter_name: str = "default", *, lowering: str = "auto") -> fx.GraphModule:
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
        gm = with_adapter(gm, name, Resident(config, lowering), None, trainable=True, activate=True)
    return derived(gm, state_of(gm))


def load_adapter(
    graph: fx.GraphModule,
    path,
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
    resident, source = Resident(config, lowering), (tensors, str(path))
    gm = with_adapter(graph, adapter_name, resident, source, trainable, activate=not state.active)
    return derived(gm, state_of(gm))


def with_adapter(gm, name: str, resident: Resident, source, trainable: bool, activate: bool,
                 deeper: bool = False) -> fx.GraphModule:  # fmt: skip
    """A graph module with one more resident adapter, not yet derived. source: what `Source` takes, None for initial values.

    deeper: the model has the layers of the config's layer_replication already.
    """
    state = state_of(gm, "apply")
    resident = dataclasses.replace(resident, config=completed(state.table, resident.config))
    config = resident.config
    if resident.lowering not in LOWERINGS:
        raise RecipeError(f"lowering={resident.lowering!r}: expected one of {LOWERINGS}")
    refuse_merged(state, "adding an adapter")
    refuse_slots(state, "adding an adapter", "peft_fx.hotswap(graph, path, name) puts one into a free slot")
    if source is None:
        refuse_to_begin(config)
    if name in state.recipe:
        raise RecipeError(f"there is an adapter {name!r} already; give another adapter_name, or use peft_fx.hotswap")
    only_one_with_biases(state, name, config)
    gm = derive(gm, fx.Graph(), state) if state.recipe else frozen(gm)
    if config.layer_replication and not deeper:
        gm = replicated(gm, config.layer_replication)
        state = state_of(gm)
    source = source and Source(*source)
    if source is not None:
        config, tensors = on_whole_base(gm, name, resident.config, source.tensors, source.where)
        if trainable and config is not resident.config:
            warn(
                f"adapter {name!r} began with a part of the base weight, and is LoRA of twice the rank here: what it began with "
                "is trained too, which PEFT keeps"
            )
        resident, source = dataclasses.replace(resident, config=config), source._replace(tensors=tensors)
    plan = planned(state, name, config)
    for entry in plan.unmatched:
        warn(f"adapter {name!r}: {entry}", UnmatchedWarning)
    for text in dict.fromkeys(p.rule.advice(p.target, p.config) for p in plan.placements):
        if text:
            warn(f"adapter {name!r}: {text}")
    recipe = {**state.recipe, name: resident}
    if not config.ensure_weight_tying and not any(r.config.layer_replication for r in recipe.values()):
        warn_of_ties(name, plan.placements, state.table)
    values = source and match_tensors(plan, source.tensors, where=source.where)
    for placement in plan.placements:
        allocate(gm, placement, values, trainable, source is not None and source.drawn)
    active = (*state.active, name) if activate else state.active
    gm.meta["peft_fx"] = state.update(recipe=recipe, active=active)
    return gm


def warn_of_ties(adapter: str, placements: Iterable[Placement], table: ModuleTable) -> None:
    """Warns of an adapter that takes a weight away from those that are tied to it; trained tokens stay tied."""
    names = (p.target.name for p in placements if p.method != "TOKENS")
    if found := next(((name, others) for name in names if (others := table.tied_to(name))), None):
        warn(
            f"adapter {adapter!r}: {found[0]} is tied to {', '.join(found[1])}, which does not change with it: files and merged "
            "models are no longer tied. LoRA, modules_to_save and tokens keep ties with ensure_weight_tying=True"
        )


def only_one_with_biases(state: State, name: str, config: AdapterConfig) -> None:
    other = next((n for n, r in state.recipe.items() if r.config.bias != "none"), None)
    if other and config.bias != "none":
        raise RecipeError(
            f"adapters {other!r} and {name!r} both train biases (bias={config.bias!r}); only one of them can"
        )


def allocate(gm: fx.GraphModule, placement: Placement, values: dict | None, trainable: bool, drawn=False) -> None:
    """Registers a placement's tensors, initialised or from a file; `drawn`: one after the other."""
    base = get_tensor(gm, placement.target.name)
    device = offloaded_to(gm.get_submodule(placement.target.path)) if base.device.type == "meta" else None
    for name, spec in placement.tensors.items():
        if name in placement.shared:
            continue
        tensor = empty_tensor(spec, base, device)
        state_name = placement.state_name(name)
        value = (values or {}).get(state_name)
        if drawn and value is not None and base.device.type != "meta":
            fill(tensor, gm, placement, name, None, {})
        fill(tensor, gm, placement, name, value, {})
        grad = trainable and tensor.is_floating_point()
        put(gm, placement, name, nn.Parameter(tensor, requires_grad=grad) if spec.trainable else tensor)
    describe(gm, [placement])


@torch.no_grad()
def fill(tensor: torch.Tensor, gm: fx.GraphModule, placement: Placement, name: str, value, newer: dict) -> None:
    """Writes a tensor's numbers: those of a file, whole or in pieces, or where it starts if `value` is None.

    newer: state name -> what will take the place of the adapter's own tensors. Raises AdapterFileError for pieces that do
    not fit.
    """
    spec = placement.tensors[name]
    if value is None:
        weights = [base_weight(gm, t) for t in spec.sources or (placement.target,)]
        spec.init(tensor, weights if spec.sources else weights[0], *values_of(gm, placement, spec.needs, newer))
        if spec.trainable and weights[0].dtype in HALF:  # PEFT makes it in that dtype first
            tensor.copy_(tensor.to(weights[0].dtype))
    elif spec.pieces is None:
        tensor.copy_(value)
    elif fault := spec.pieces.join(tensor, value, *values_of(gm, placement, spec.needs, newer)):
        raise AdapterFileError(f"{placement.file_key(name)}: {fault}")


def values_of(gm: fx.GraphModule, placement: Placement, tensors: tuple[str, ...], newer: dict) -> list[torch.Tensor]:
    """The values of some of a placement's tensors."""
    names = [placement.resolve(n).name for n in tensors]
    return [newer[n] if n in newer else get_tensor(gm, f"{ADAPTERS}.{n}").detach() for n in names]


def base_weight(gm: fx.GraphModule, target: Target) -> torch.Tensor:
    """A target's weight in canonical layout; for one expert of a stack, its own."""
    W = get_tensor(gm, target.tensor_name).detach()
    return to_canonical(W if target.expert is None else W[target.expert], target)


def empty_tensor(spec: Tensor, base: torch.Tensor, device=None) -> torch.Tensor:
    """Memory for one tensor of an adapter of the weight `base`, where that is unless a device is given."""
    return torch.empty(spec.shape, dtype=spec.dtype_on(base.dtype), device=base.device if device is None else device)


def offloaded_to(module: nn.Module):
    """The device to which accelerate brings a module's weights for a call; None if it does not."""
    hook = getattr(module, "_hf_hook", None)
    devices = [getattr(h, "execution_device", None) for h in getattr(hook, "hooks", (hook,))]
    return next((d for d in devices if d is not None), None)


def set_adapter(tuned: fx.GraphModule, names: str | list[str]) -> fx.GraphModule:
    """The graph with exactly these adapters active, composed in the order given; inactive adapters cost nothing.

    Raises GraphError for names that are not resident, merged graphs and those with slots, where `switch` does it.
    """
    state = state_of(tuned, "set_adapter")
    refuse_merged(state, "set_adapter")
    refuse_slots(state, "set_adapter", "which adapters act is data there, peft_fx.switch(graph, names) writes it")
    return derived(tuned, state.update(active=names_of(state, names)))


def without(state: State, name: str) -> State:
    """The state with an adapter less."""
    recipe = {n: r for n, r in state.recipe.items() if n != name}
    return state.update(recipe=recipe, active=tuple(n for n in state.active if n != name))


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
    return write_adapter(as_path(path, "a folder to write the adapter to"), *adapter_files(tuned, adapter_name))


def adapter_files(
    tuned: fx.GraphModule, adapter_name: str | None = None
) -> tuple[AdapterConfig, dict[str, torch.Tensor]]:
    """What `save_adapter` writes: the config, and file key -> tensor."""
    state = state_of(tuned, "save_adapter")
    name = only_adapter(state) if adapter_name is None else names_of(state, adapter_name)[0]
    config = state.recipe[name].config
    plan, tensors = planned(state, name, config), {}
    for placement, tensor_name, keys in plan.filed:
        found = [filed(tuned, placement, tensor_name)]
        if pieces := placement.tensors[tensor_name].pieces:
            found = pieces.split(*found, *(filed(tuned, placement, other) for other in pieces.reads))
        tensors |= zip(keys, found, strict=True)
    if config.base_model_name_or_path is None and state.table.name_or_path:
        config = dataclasses.replace(config, base_model_name_or_path=state.table.name_or_path)
    # Default targets are written out, as PEFT does: SGLang reads the names from here. A regex, which the defaults of a few
    # models are, cannot stand beside layers_to_transform; there readers apply the default again.
    names = resolved_target_modules(state.table, config)
    if isinstance(names, list) or config.layers_to_transform is None:
        config = dataclasses.replace(config, target_modules=names)
    return file_config(config, plan), tensors


def filed(tuned: fx.GraphModule, placement: Placement, name: str) -> torch.Tensor:
    """A tensor as files hold it: as the target's own, and without what its slot has beyond the adapter's rank."""
    spec, shared = placement.tensors[name], placement.resolve(name)
    tensor = get_tensor(tuned, f"{ADAPTERS}.{shared.name}").detach()
    tensor = tensor.t() if shared.transposed else tensor
    cropped = crop_to(tensor, spec.shape, spec.pad)
    if cropped.shape != tensor.shape and cropped.count_nonzero() != tensor.count_nonzero():
        raise GraphError(
            f"{placement.target.name}: {name} holds numbers beyond the adapter's rank, where a hotswap wrote zeros: the "
            "optimiser still had the momentum of the adapter before; clear optimizer.state after a swap. Nothing was written"
        )
    return cropped


def only_adapter(state: State) -> str:
    for places in (tuple(state.residents.values()), state.active):
        if len(places) == 1:
            return places[0]
    raise RecipeError(f"which adapter? Give adapter_name, one of: {', '.join(state.residents) or 'none resident'}")
