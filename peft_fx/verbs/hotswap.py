"""`hotswap`: other numbers into the same tensors, so that every `torch.compile` guard still holds.

Everything is checked first; then all tensors are written with `copy_` (which raises between forward and backward, as it
should, where `.data.copy_` would corrupt gradients silently). A lower rank is zero-padded into the slot; targets that the
new adapter leaves out get zero factors. Where the adapter is merged, the folded weights are written (`refold`).
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch
from torch import fx

from ..engine.fitting import slots_of
from ..engine.slots import refuse_taken, slot_for
from ..engine.swapping import read, refolded, swap_of, write
from ..engine.swaps import Swap, SwapReport
from ..errors import HotswapError
from ..store.state import state_of
from ..store.unwrap import unwrapped


def hotswap(tuned: fx.GraphModule, path: Any, adapter_name: str = "default") -> SwapReport:
    """Replaces the numbers of a resident adapter by those of another one, in place: 0 recompiles.

    tuned: the graph module from `apply` / `load_adapter`, torch.compile's result for it, or a `load_package`. path: what
    `load_adapter` takes, a pair (config, file key -> tensor), or what `prepare_swap` made of either. Graphs derived from one
    another share the adapter's tensors: all of them see the swap. An optimiser that keeps running keeps the momentum of the
    numbers before: clear its `state`, as for any parameter that is overwritten. On a graph from `reserve` a new
    adapter_name takes a free slot, which stays off until `switch`.

    A merged adapter gives way to one of any method, rank and targets: the weights are folded anew from the kept base. Calls
    in other threads see the old numbers or the new ones, never some of each.

    Raises HotswapError or AdapterFileError, and changes nothing, if Inductor freezing is on, if the new adapter needs
    another method, other targets or a larger rank than the slot has, or, merged, if the merge kept no base weights or the
    new adapter needs other operators: a bias more, no groups, a tie undone.
    """
    start = time.perf_counter()
    gm = unwrapped(tuned)
    state_of(gm, "hotswap")
    with gm.peft_fx.sharing.swapping():
        state = state_of(gm)
        refuse_freezing()
        if isinstance(path, Swap):
            slot, adapter_name = path.slot, path.adapter
            if slot not in state.recipe or state.recipe[slot].home is not path.home or slot in state.merged:
                raise HotswapError(
                    f"adapter {adapter_name!r}: this swap was prepared for another graph, or before a merge"
                )
            refuse_taken(state, slot, adapter_name)
        else:
            slot = slot_for(state, adapter_name)
        if slot in state.merged:
            written, padded, zeroed = refolded(gm, state, slot, adapter_name, *read(gm, state, slot, path))
        else:
            slots = slots_of(gm, slot)
            swap = path if isinstance(path, Swap) else swap_of(gm, state, slot, slots, adapter_name, path)
            written, padded, zeroed, path = write(gm, state, slots, swap), swap.padded, swap.zeroed, swap.source
    elements = sum(t.numel() for t in written)
    source = "memory" if isinstance(path, tuple) else str(path)
    return SwapReport(adapter_name, source, len(written), elements, padded, zeroed, time.perf_counter() - start)


def prepare_swap(tuned: fx.GraphModule, path: Any, adapter_name: str = "default") -> Swap:
    """Reads and checks an adapter for later: `hotswap(tuned, swap)` then is a copy of its numbers.

    Raises what `hotswap` raises, and HotswapError for a merged adapter, whose weights are folded when they are swapped.
    """
    gm = unwrapped(tuned)
    state = state_of(gm, "prepare_swap")
    slot = slot_for(state, adapter_name)
    if slot in state.merged:
        raise HotswapError(f"adapter {adapter_name!r} is merged: swap it from its folder, or unmerge it first")
    slots = slots_of(gm, slot)
    swap = swap_of(gm, state, slot, slots, adapter_name, path)
    # of the slots' dtype and device, in memory of their own
    values = tuple(v.to(slots[n], copy=True) for n, v in zip(swap.names, swap.values, strict=True))
    return dataclasses.replace(swap, values=values)


def refuse_freezing() -> None:
    if torch._inductor.config.freezing:
        raise HotswapError(
            "torch._inductor.config.freezing folds parameters into the compiled code, a swap would have no effect: "
            "turn it off and compile again"
        )
