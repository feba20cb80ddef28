"""Which adapters act, as data: gates in the graph, changed in place, so that a compiled graph never recompiles.

`reserve` puts every resident adapter and the free slots into one graph, each behind a gate; `switch` writes the gates; a
hotswap under a new name fills a free slot.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from ..errors import GraphError
from ..store import GATES, Resident, get_tensor, set_tensor, state_of
from .adapters import allocate
from .derive import acting, derived, names_of, placements, refuse_merged
from .hotswap import prepare_hotswap


def reserve(tuned: fx.GraphModule, *, slots: int, max_rank: int | None = None) -> fx.GraphModule:
    """A graph with `slots` adapters in it: the resident ones, and free slots made for adapters like the first.

    What acts is what was active; `switch` changes it, `hotswap(graph, path, "name")` loads an adapter into a free slot, both
    with 0 recompiles. max_rank: every slot holds ranks up to it. An adapter that does not act still computes.

    Raises GraphError if no adapter is resident, more than `slots` are, or the graph is merged; RecipeError for adapters that
    cannot be active together.
    """
    state = state_of(tuned, "reserve")
    refuse_merged(state, "reserve")
    if state.slots:
        raise GraphError("this graph has slots already: reserve from the graph without them, e.g. set_adapter's result")
    if not state.recipe:
        raise GraphError("reserve needs an adapter whose targets and method the slots follow: apply or load one first")
    if not isinstance(slots, int) or slots < len(state.recipe):
        raise GraphError(f"slots={slots!r}: expected at least the number of resident adapters, {len(state.recipe)}")
    on = state.active
    new = prepare_hotswap(tuned, max_rank=max_rank) if max_rank else derived(tuned, state)
    state = state_of(new)
    first = next(iter(state.recipe.values()))
    if max_rank:
        first = Resident(first.config.with_rank(max_rank), first.lowering)
    names = [f"slot{i}" for i in range(slots) if f"slot{i}" not in state.recipe][: slots - len(state.recipe)]
    recipe = {**state.recipe, **{name: Resident(first.config, first.lowering) for name in names}}
    order = (*on, *(n for n in recipe if n not in on))
    known = {name: name if name in state.recipe else None for name in recipe}
    state = state.update(recipe=recipe, active=order, slots=known)
    for name in names:
        for placement in placements(state, name):
            allocate(new, placement, None, trainable=False)
    gate = next(iter(new.peft_fx.adapters.parameters())).new_zeros((), dtype=torch.float32)
    for name in recipe:
        set_tensor(new, f"{GATES}.{name}", gate.detach() + (name in on))
    return derived(new, state)


def switch(
    tuned: fx.GraphModule, names: str | Sequence[str] | None, weights: Sequence[float] | None = None
) -> dict[str, float]:
    """Makes exactly these adapters act, in place: 0 recompiles. Returns adapter -> weight of what acted before.

    tuned: a graph from `reserve`, or what `compile` or `torch.compile` made of it. names: None switches all off.
    weights: how much of each acts, 1 unless given: a factor of the update for additive methods, an interpolation between
    without and with it for others.

    Raises GraphError, and changes nothing, for a graph without gates, unknown names or weights that do not fit.
    """
    gm = getattr(tuned, "_orig_mod", tuned)
    state = state_of(gm, "switch")
    refuse_merged(state, "switch")
    if not state.slots:
        raise GraphError("this graph has no gates: make one with peft_fx.reserve(tuned, slots=...) before compiling")
    chosen = names_of(state, () if names is None else names)
    factors = [1.0] * len(chosen) if weights is None else weights
    if (
        not isinstance(factors, (list, tuple))
        or len(factors) != len(chosen)
        or not all(isinstance(w, (int, float)) for w in factors)
    ):
        raise GraphError(f"weights={weights!r}: expected {len(chosen)} numbers in a list, one per adapter")
    wanted = dict(zip(chosen, factors, strict=True))
    gates = {slot: get_tensor(gm, f"{GATES}.{slot}") for slot in state.slots}
    sharing = gm.peft_fx.sharing
    with sharing.swapping(), sharing.writing(gates.values()), torch.no_grad():
        before = acting(gm, state)
        for slot, gate in gates.items():
            gate.fill_(wanted.get(slot, 0.0))
    return before
