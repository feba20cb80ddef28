"""`preview`: the graph that `apply` would make, to be looked at. Refused targets are left out, no number is initialised.

So a recipe can be judged on a model whose weights are not there (meta tensors), and one bad target hides none of the others.
"""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from ..engine.adding import empty_tensor
from ..engine.derive import replicated
from ..engine.transitions import refuse_merged, swapped
from ..errors import RecipeError
from ..passes.core.base import run
from ..passes.inject.inject import Inject, lower
from ..planning.plan import Placement, make_plan
from ..recipe import as_recipe
from ..store.lazy import copy_graph
from ..store.modules import derive
from ..store.state import Resident, base_of, state_of
from ..store.tensors import ADAPTERS, kept_of, set_tensor


def preview(graph: fx.GraphModule, recipe: Any) -> fx.GraphModule:
    """`graph` with a recipe's adapters after those that are active. Raises RecipeError if the recipe chooses nothing."""
    state = state_of(graph, "preview")
    refuse_merged(state, "adding an adapter")
    gm: fx.GraphModule = derive(graph, fx.Graph(), state)
    new: list[Placement] = []
    for name, config in as_recipe(recipe).items():
        if name in state.recipe:
            raise RecipeError(f"there is an adapter {name!r} already; give the new one another name")
        if config.layer_replication:
            gm = replicated(gm, config.layer_replication)
        state = state_of(gm)
        plan = make_plan(state.table, name, config, strict=False)
        new += plan.placements
        state = swapped(state, name, Resident(config, plan))
        gm.meta["peft_fx"] = state
    for placement in new:
        allocate_empty(gm, placement)
    present = [p for name in state.acting for p in state.recipe[name].placements]
    base = base_of(state)
    accepted = [x.placement for x in lower(base.graph, [*present, *new], base.traces) if x.form != "refused"]
    shown = derive(gm, copy_graph(base.graph), state)
    shown.meta["peft_fx"] = state.update(reports=run((Inject(tuple(accepted)),), shown))
    return shown


def allocate_empty(gm: fx.GraphModule, placement: Placement) -> None:
    base = kept_of(gm, placement.target.name)
    for name, spec in placement.tensors.items():
        if name not in placement.shared:
            tensor = empty_tensor(spec, base)
            value = nn.Parameter(tensor, requires_grad=tensor.is_floating_point()) if spec.trainable else tensor
            set_tensor(gm, f"{ADAPTERS}.{placement.state_name(name)}", value)
