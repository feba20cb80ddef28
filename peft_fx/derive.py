"""Derive an adapted graph: base graph + active adapters -> new GraphModule over the same tensors.

Every verb that changes which adapters act goes through `derived`; none edits its way from one adapted graph to another.
"""

from __future__ import annotations

import torch
from torch import fx, nn

from .errors import GraphError
from .passes.base import run
from .passes.inject import Inject
from .plan import Placement, make_plan
from .store import State, copy_graph, derive, state_of


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
        raise GraphError(f"{verb} on a merged graph ({', '.join(state.merged)}): unmerge it first with peft_fx.unmerge(graph)")


def adapter_dtype(base: torch.dtype) -> torch.dtype:
    """fp32 for half-precision and 8-bit bases, as PEFT's autocast_adapter_dtype; else the base's own dtype."""
    return base if base in (torch.float32, torch.float64) else torch.float32
