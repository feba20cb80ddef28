"""Room for adapters of larger ranks, made before a graph is compiled."""

from __future__ import annotations

from torch import fx

from ..engine.derive import derived
from ..engine.transitions import refuse_merged
from ..engine.widening import widened
from ..store.state import state_of


def prepare_hotswap(tuned: fx.GraphModule, *, max_rank: int) -> fx.GraphModule:
    """Widens every slot to `max_rank` with zeros, before compiling, so that adapters of any rank up to it can be swapped in.

    Returns a new graph with adapter tensors of its own: build the optimiser after this. Outputs do not change. Raises
    HotswapError if a resident adapter's rank is larger.
    """
    state = state_of(tuned, "prepare_hotswap")
    refuse_merged(state, "prepare_hotswap")
    new = widened(tuned, state, max_rank)
    return derived(new, state_of(new))
