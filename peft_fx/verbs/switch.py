"""Which adapters act, as data: gates in the graph, changed in place, so that a compiled graph never recompiles.

`reserve` puts every resident adapter and the free slots into one graph, each behind a gate; `switch` writes the gates; a
hotswap under a new name fills a free slot, which `release` (slots.py) frees again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import fx

from ..engine.derive import acting, derived
from ..engine.slots import reserved, with_slots
from ..engine.transitions import names_of, refuse_merged
from ..errors import GraphError
from ..store.state import state_of
from ..store.tensors import gate_name, store_of, tensor_of


def reserve(tuned: fx.GraphModule, *, slots: int, max_rank: int | None = None) -> fx.GraphModule:
    """A graph with `slots` adapters in it: the resident ones, and free slots made for adapters like the first.

    What acts is what was active; `switch` changes it, `hotswap(graph, path, "name")` loads an adapter into a free slot,
    `release(graph, "name")` frees its slot again, all with 0 recompiles. `slots(graph)` lists them. max_rank: every slot
    holds ranks up to it. An adapter that does not act still computes. The slots have tensors of their own.

    Raises GraphError if no adapter is resident, more than `slots` are, or the graph is merged; RecipeError for adapters that
    cannot be active together.
    """
    state = state_of(tuned, "reserve")
    new, recipe = reserved(tuned, state, slots, max_rank)
    active = (*state.active, *(place for place in recipe if place not in state.active))
    state = state.update(recipe=recipe, active=active, gated=True)
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
    gm, state = with_slots(tuned, "switch")
    refuse_merged(state, "switch")
    chosen = names_of(state, () if names is None else names)
    factors = [1.0] * len(chosen) if weights is None else weights
    if (
        not isinstance(factors, (list, tuple))
        or len(factors) != len(chosen)
        or not all(isinstance(w, (int, float)) for w in factors)
    ):
        raise GraphError(f"weights={weights!r}: expected {len(chosen)} numbers in a list, one per adapter")
    wanted = dict(zip(chosen, factors, strict=True))
    gates = {slot: tensor_of(gm, gate_name(slot)) for slot in state.recipe}
    sharing = store_of(gm).sharing
    with sharing.swapping(), sharing.writing(gates.values()), torch.no_grad():
        before = acting(gm, state)
        for slot, gate in gates.items():
            gate.fill_(wanted.get(slot, 0.0))
    return {cast(str, state.recipe[slot].name): weight for slot, weight in before.items()}
