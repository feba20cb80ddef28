"""Derive an adapted graph: base graph + active adapters -> new GraphModule over the same tensors.

Every verb that changes which adapters act goes through `derived`; none edits its way from one adapted graph to another.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import fx, nn

from ..config import AdapterConfig
from ..errors import GraphError, RecipeError
from ..methods import get_method
from ..passes.capture.replicate import ReplicateLayers, layer_list, replicated_table, sources
from ..passes.core.base import run
from ..passes.inject.inject import Inject
from ..passes.inject.mixed import MixedBatch
from ..planning.plan import Placement, Plan, make_plan
from ..store.lazy import copy_graph
from ..store.modules import derive, shell
from ..store.state import Acted, BaseGraph, State, state_of
from ..store.tensors import ADAPTERS, GATES, get_tensor
from ..suggestions import did_you_mean


def derived(gm: fx.GraphModule, state: State) -> fx.GraphModule:
    """The graph that `state` describes, over `gm`'s tensors; `gm` is not changed."""
    new = derive(gm, fx.Graph(), state)
    new._keep(state.base.graph)
    reports = run(injection(state), new)
    new._keep()
    new.meta["peft_fx"] = state.update(reports=reports)
    return new


def acted(gm: fx.GraphModule, state: State) -> Acted | None:
    """What acts in `gm` now, for after a merge; None where nobody promises that its graph was not changed."""
    return Acted(gm._kept, made_from(gm, state), state.reports) if gm._kept else None


def acting_again(gm: fx.GraphModule, state: State) -> fx.GraphModule:
    """What `derived` gives for a new module, which becomes it where the graph from before the merge would come out again."""
    before = state.acted
    state = state.update(acted=None)
    if before is None or before.made_from != made_from(gm, state):
        return derived(gm, state)
    gm._keep(before.graph)
    gm.meta["peft_fx"] = state.update(reports=before.reports)
    return gm


def made_from(gm: fx.GraphModule, state: State) -> tuple:
    """All that the graph of `state` depends on besides the base graph: what goes where, by which methods, over which tensors.

    Their device is not in it: values in a graph keep that of the capture.
    """
    chosen = [p for name in state.active for p in placements(state, name)]
    names = {f"{ADAPTERS}.{p.resolve(name).name}" for p in chosen for name in p.tensors}
    tensors = {name: (t.shape, t.stride(), t.dtype, t.requires_grad) for name in names for t in [get_tensor(gm, name)]}
    return injection(state), {type(get_method(p.method)) for p in chosen}, tensors


def injection(state: State) -> tuple[Inject, ...]:
    """The passes that put the active adapters in."""
    each = tuple(placements(state, name) for name in state.active)
    if state.mixed:
        return (MixedBatch(state.called(state.active), each),)
    return (Inject(tuple(p for chosen in each for p in chosen), state.gated),)


def placements(state: State, adapter: str) -> tuple[Placement, ...]:
    """What a resident adapter puts where."""
    resident = state.recipe[adapter]
    chosen = planned(state, adapter, resident.config).placements
    return chosen if resident.lowering == "auto" else tuple(replace(p, lowering=resident.lowering) for p in chosen)


def planned(state: State, adapter: str, config: AdapterConfig) -> Plan:
    """`make_plan`, once for each config that this base graph has met."""
    known = state.base.traces
    key = ("plan", adapter, type(get_method(config.peft_type)), repr(config))  # a user's method may be registered anew
    if key not in known:
        known[key] = make_plan(state.table, adapter, config)
    return known[key]


def frozen(gm: fx.GraphModule) -> fx.GraphModule:
    """The module, not yet its graph, over frozen aliases of its parameters: new Parameters on the same memory, ties kept.

    The user's model keeps its own Parameters and their requires_grad.
    """
    new = derive(gm, fx.Graph(), state_of(gm))
    aliases: dict[nn.Parameter, nn.Parameter] = {}
    for module in new.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                alias = aliases.get(parameter)
                if alias is None:
                    alias = aliases[parameter] = nn.Parameter(parameter.detach(), requires_grad=False)
                module._parameters[name] = alias
    return new


def names_of(state: State, names: str | list[str] | tuple[str, ...]) -> tuple[str, ...]:
    """Adapter names as a tuple, of slots those of the slots. Raises GraphError for one that is not resident."""
    resident = state.residents
    there = ", ".join(resident) or "none"
    if not isinstance(names, Iterable):
        raise GraphError(f"expected an adapter's name or a list of names, got {names!r}; resident: {there}")
    chosen = (names,) if isinstance(names, str) else tuple(names)
    for name in chosen:
        if name not in resident:
            raise GraphError(f"there is no adapter {name!r}; resident: {there}{did_you_mean(name, resident)}")
    if len(set(chosen)) != len(chosen):
        raise GraphError(f"adapter names are repeated: {list(chosen)}")
    return tuple(resident[name] for name in chosen)


def acting(gm: fx.GraphModule, state: State) -> dict[str, float]:
    """Slot -> weight of the adapters whose gate is open."""
    gates = {slot: get_tensor(gm, f"{GATES}.{slot}").item() for slot in state.recipe}
    return {slot: gate for slot, gate in gates.items() if gate}


def refuse_merged(state: State, verb: str) -> None:
    if state.mixed:
        raise GraphError(f"{verb} on a graph for mixed batches: use the graph that peft_fx.mixed_batch made it from")
    if state.merged:
        raise GraphError(
            f"{verb} on a merged graph ({', '.join(state.called(state.merged))}): unmerge it first with "
            "peft_fx.unmerge(graph)"
        )


def refuse_slots(state: State, verb: str, instead: str) -> None:
    if state.gated:
        raise GraphError(f"{verb} on a graph with slots: {instead}, or use the graph that peft_fx.reserve made it from")


def replicated(gm: fx.GraphModule, ranges) -> fx.GraphModule:
    """The deeper model that `layer_replication` asks for, as a base graph over the same parameters.

    Raises RecipeError if the model has no list of layers, or adapters already.
    """
    state = state_of(gm)
    if state.recipe:
        raise RecipeError("layer_replication changes the base model and has to come with the first adapter")
    path = layer_list(state.table)
    container = gm.get_submodule(path)
    order = tuple(sources(ranges, len(container._modules)))
    new = derive(gm, copy_graph(state.base.graph), state)
    layers = new.get_submodule(path)
    layers._modules = {str(i): shell(container._modules[str(source)]) for i, source in enumerate(order)}
    run([ReplicateLayers(path, order)], new)
    table = replicated_table(state.table, path, order)
    new.meta["peft_fx"] = state.update(table=table, base=BaseGraph(copy_graph(new.graph)))
    return new
