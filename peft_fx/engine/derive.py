"""Derive an adapted graph: base graph + active adapters -> new GraphModule over the same tensors.

Every verb that changes which adapters act goes through `derived`; none edits its way from one adapted graph to another.
"""

from __future__ import annotations

from typing import cast

from torch import fx, nn

from ..errors import RecipeError
from ..methods import get_method
from ..passes.capture.replicate import ReplicateLayers, layer_list, replicated_table, sources
from ..passes.core.base import Pass, run
from ..passes.inject.inject import Inject
from ..passes.inject.mixed import MixedBatch
from ..store.lazy import Lazy, copy_graph
from ..store.modules import derive, shell
from ..store.state import Acted, BaseGraph, State, base_of, state_of
from ..store.tensors import ADAPTERS, gate_name, tensor_of


def derived(gm: fx.GraphModule, state: State) -> fx.GraphModule:
    """The graph that `state` describes, over `gm`'s tensors; `gm` is not changed."""
    new = derive(gm, fx.Graph(), state)
    new._keep(base_of(state).graph)
    reports = run(injection(state), new)
    new._keep()
    new.meta["peft_fx"] = state.update(reports=reports)
    return new


def acted(gm: fx.GraphModule, state: State) -> Acted | None:
    """What acts in `gm` now, for after a merge; None where nobody promises that its graph was not changed."""
    kept = cast(Lazy, gm)._kept
    return Acted(kept, made_from(gm, state), state.reports) if kept else None


def acting_again(gm: fx.GraphModule, state: State) -> fx.GraphModule:
    """What `derived` gives for a new module, which becomes it where the graph from before the merge would come out again."""
    before = state.acted
    state = state.update(acted=None)
    if before is None or before.made_from != made_from(gm, state):
        return derived(gm, state)
    cast(Lazy, gm)._keep(before.graph)
    gm.meta["peft_fx"] = state.update(reports=before.reports)
    return gm


def made_from(gm: fx.GraphModule, state: State) -> tuple:
    """All that the graph of `state` depends on besides the base graph: what goes where, by which methods, over which tensors.

    Their device is not in it: values in a graph keep that of the capture.
    """
    chosen = state.placed(state.acting)
    names = {f"{ADAPTERS}.{p.resolve(name).name}" for p in chosen for name in p.tensors}
    tensors = {name: (t.shape, t.stride(), t.dtype, t.requires_grad) for name in names for t in [tensor_of(gm, name)]}
    return injection(state), {type(get_method(p.method)) for p in chosen}, tensors


def injection(state: State) -> tuple[Pass, ...]:
    """The passes that put the active adapters in."""
    if state.mixed:
        each = tuple(state.recipe[name].placements for name in state.acting)
        return (MixedBatch(state.called(state.acting), each),)
    return (Inject(state.placed(state.acting), state.gated, state.aware),)


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


def acting(gm: fx.GraphModule, state: State) -> dict[str, float]:
    """Slot -> weight of the adapters whose gate is open."""
    gates = {slot: tensor_of(gm, gate_name(slot)).item() for slot in state.recipe}
    return {slot: gate for slot, gate in gates.items() if gate}


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
    new = derive(gm, copy_graph(base_of(state).graph), state)
    layers = new.get_submodule(path)
    layers._modules = {str(i): shell(container.get_submodule(str(source))) for i, source in enumerate(order)}
    run([ReplicateLayers(path, order)], new)
    table = replicated_table(state.table, path, order)
    new.meta["peft_fx"] = state.update(table=table, base=BaseGraph(copy_graph(new.graph)))
    return new
