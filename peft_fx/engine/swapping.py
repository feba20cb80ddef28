"""A swap: read, checked against its slot, written."""

from __future__ import annotations

import torch
from torch import fx

from ..config import AdapterConfig
from ..errors import HotswapError, MergeError, RecipeError
from ..files.keys import of_model
from ..files.match import match_tensors
from ..files.read import read_adapter
from ..planning.kinds import Refusal
from ..planning.plan import Plan
from ..store.state import State
from ..store.tensors import copy_all
from .fitting import by_place, neutral, planned, planned_writes, refuse_faults, with_targets_of
from .placed import describe
from .refold import refold
from .residual import on_whole_base
from .swaps import Swap
from .transitions import publish


def read(gm: fx.GraphModule, state: State, slot: str, path) -> tuple[AdapterConfig, Plan, dict]:
    """An adapter's config, what it puts where, and its numbers by state name."""
    if isinstance(path, tuple):
        (config, tensors), where = path, "what was given"
        tensors = of_model(tensors, state.table)
    else:
        (config, tensors), where = read_adapter(path, state.table), str(path)
    config, tensors = on_whole_base(gm, slot, config, tensors, where)
    plan = planned(state, slot, config)
    return config, plan, match_tensors(plan, tensors, where=where)


def swap_of(gm, state: State, slot: str, slots: dict, name: str, path) -> Swap:
    """The checked swap that makes the slot hold the adapter at `path`; targets that it leaves out become neutral.

    slots: the slot's tensors by state name.
    """
    config, plan, values = read(gm, state, slot, path)
    old, new = by_place(state.recipe[slot].placements), by_place(plan.placements)
    faults = [
        Refusal(p.target.name, f"the resident adapter has no {p.method} there") for k, p in new.items() if k not in old
    ]
    left_out = [k for k in old if k not in new]
    for p in (old[k] for k in left_out):
        if neutral(p) is None:
            reason = f"the new adapter leaves it out, and {p.method} has no neutral value to put there"
            faults.append(Refusal(p.target.name, reason))
    refuse_faults(name, faults)
    if left_out:
        config = with_targets_of(state.recipe[slot].config, config)
        plan = planned(state, slot, config)
        new = by_place(plan.placements)
    names, fitting, padded = planned_writes(gm, slot, slots, old, new, values, left_out)
    zeroed = tuple(old[k].target.name for k in left_out)
    source = "memory" if isinstance(path, tuple) else str(path)
    return Swap(name, slot, source, config, plan, names, fitting, padded, zeroed, state.recipe[slot].home)


def write(gm, state: State, slots: dict, swap: Swap) -> list[torch.Tensor]:
    """Copies a swap's numbers into the graph's tensors, and returns these."""
    written = [slots[name] for name in swap.names]
    with gm.peft_fx.sharing.writing(written), torch.no_grad():
        copy_all(zip(written, swap.values, strict=True))
        resident = state.recipe[swap.slot].update(
            config=swap.config, plan=swap.plan, name=swap.adapter if state.gated else None
        )
        publish(gm, swap.slot, resident)
        describe(gm, resident.placements)
    return written


def refolded(gm, state: State, slot: str, name: str, config, plan: Plan, values: dict):
    """Writes a merged adapter's folded weights; (tensors written, number padded, targets that the new adapter leaves out)."""
    try:
        return refold(gm, state, slot, config, values)
    except (MergeError, RecipeError) as error:
        raise HotswapError(f"adapter {name!r} cannot be swapped in place, nothing was changed: {error}") from error
