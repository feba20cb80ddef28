"""The slots of a graph from `reserve`: what is in them, under which name, and how they become free again.

A slot's name and config belong to its tensors, so that all graphs over these tensors see a swap, a release and a new name.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import fx

from ..engine.derive import derived
from ..engine.placed import describe
from ..engine.slots import allocate_slot, fresh, set_gate, with_slots
from ..engine.transitions import deleted, emptied, names_of, publish, refuse_merged
from ..errors import GraphError
from ..planning.plan import check_adapter_name
from ..store.modules import derive
from ..store.state import state_of
from ..store.tensors import gate_name, store_of, tensor_of


class Slot(NamedTuple):
    """slot: where its tensors are, below `gm.peft_fx.adapters`. name: of the adapter in it, None while it is free.

    max_rank: the largest rank that fits, None for methods without one. weight: how much of it acts now.
    """

    slot: str
    name: str | None
    peft_type: str
    max_rank: int | None
    weight: float


def slots(tuned: fx.GraphModule) -> tuple[Slot, ...]:
    """The slots of a graph from `reserve`, of what `compile` or `torch.compile` made of it, or of a package with slots.

    Raises GraphError for a graph without slots.
    """
    gm, state = with_slots(tuned, "slots")
    return tuple(
        Slot(
            slot,
            resident.name,
            room.peft_type or "",
            getattr(room, room.ranked, None),
            tensor_of(gm, gate_name(slot)).item(),
        )
        for slot, resident in state.recipe.items()
        for room in [resident.room or resident.config]
    )


def release(tuned: fx.GraphModule, name: str) -> None:
    """Frees the slot of an adapter, in place: 0 recompiles. It acts no more, and a hotswap under a new name takes the slot.

    tuned: as for `switch`. The slot's numbers become those of a fresh adapter, which draws nothing from torch's generator; in
    a package, which has no base weights to start from, they stay until a swap. `delete_adapter` leaves its input as it is and
    returns a graph whose slot is free.

    Raises GraphError, and changes nothing, for a graph without slots, a merged one, or a name that is not resident.
    """
    gm, _ = with_slots(tuned, "release")
    sharing = store_of(gm).sharing
    with sharing.swapping():
        state = state_of(gm)
        refuse_merged(state, "release")
        (slot,) = names_of(state, name)
        free = emptied(state, slot)
        numbers = fresh(gm, free.placements)
        tensors = [tensor_of(gm, full) for full in numbers]
        gate = tensor_of(gm, gate_name(slot))
        with sharing.writing([gate, *tensors]), torch.no_grad():
            gate.zero_()
            for tensor, number in zip(tensors, numbers.values(), strict=True):
                tensor.copy_(number)
            publish(gm, slot, free)
            describe(gm, free.placements)


def delete_adapter(tuned: fx.GraphModule, name: str) -> fx.GraphModule:
    """The graph without an adapter; its tensors go when no other graph holds them.

    Of a graph with slots: a graph in which its slot is free and has tensors and a gate of its own, so that `tuned` goes on
    as it is. `release` frees the slot in place. Raises GraphError for a name that is not resident, or a merged graph.
    """
    state = state_of(tuned, "delete_adapter")
    (place,) = names_of(state, name)
    state = deleted(state, place)
    if not state.gated:
        new = derived(tuned, state)
        store_of(new).adapters._modules.pop(place, None)
        return new
    new = derive(tuned, fx.Graph(), state)
    allocate_slot(new, state, place)
    set_gate(new, place, 0)
    return derived(new, state)


def rename(tuned: fx.GraphModule, name: str, new_name: str) -> None:
    """Gives an adapter in a slot another name, in place; nothing is computed. tuned: as for `switch`.

    Raises GraphError for a graph without slots, a name that is not resident, or a new name that another adapter has.
    """
    gm, _ = with_slots(tuned, "rename")
    with store_of(gm).sharing.swapping():
        state = state_of(gm)
        (slot,) = names_of(state, name)
        check_adapter_name(new_name)
        if state.residents.get(new_name, slot) != slot:
            raise GraphError(
                f"there is an adapter {new_name!r} already: release it, or choose another name for {name!r}"
            )
        publish(gm, slot, state.recipe[slot].update(name=new_name))
