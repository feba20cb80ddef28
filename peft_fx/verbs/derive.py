"""Derive an adapted graph: base graph + active adapters -> new GraphModule over the same tensors.

Every verb that changes which adapters act goes through `derived`; none edits its way from one adapted graph to another.
"""

from __future__ import annotations

import torch
from torch import fx, nn

from ..errors import GraphError, RecipeError
from ..passes.base import run
from ..passes.inject import Inject
from ..passes.replicate import ReplicateLayers, layer_list, replicated_table, sources
from ..planning.plan import Placement, make_plan
from ..store import BaseGraph, State, copy_graph, derive, shell, state_of


def derived(gm: fx.GraphModule, state: State) -> fx.GraphModule:
    """The graph that `state` describes, over `gm`'s tensors; `gm` is not changed."""
    new = derive(gm, copy_graph(state.base.graph), state)
    reports = run(injection(state), new)
    new.meta["peft_fx"] = state.update(reports=reports)
    return new


def injection(state: State) -> tuple[Inject, ...]:
    """The passes that put the active adapters in."""
    return (Inject(tuple(p for name in state.active for p in placements(state, name))),)


def placements(state: State, adapter: str) -> tuple[Placement, ...]:
    """What a resident adapter puts where."""
    return make_plan(state.table, adapter, state.recipe[adapter].config).placements


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
    """Adapter names as a tuple. Raises GraphError for one that is not resident."""
    chosen = (names,) if isinstance(names, str) else tuple(names)
    for name in chosen:
        if name not in state.recipe:
            raise GraphError(f"there is no adapter {name!r}; resident: {', '.join(state.recipe) or 'none'}")
    if len(set(chosen)) != len(chosen):
        raise GraphError(f"adapter names are repeated: {list(chosen)}")
    return chosen


def refuse_merged(state: State, verb: str) -> None:
    if state.merged:
        raise GraphError(
            f"{verb} on a merged graph ({', '.join(state.merged)}): unmerge it first with peft_fx.unmerge(graph)"
        )


def adapter_dtype(base: torch.dtype) -> torch.dtype:
    """fp32 for half-precision and 8-bit bases, as PEFT's autocast_adapter_dtype; else the base's own dtype."""
    return base if base in (torch.float32, torch.float64) else torch.float32


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
