"""Slots of a graph in which adapters are switched as data."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from ..errors import GraphError, HotswapError
from ..planning.plan import Placement, check_adapter_name
from ..store.state import Resident, State, state_of
from ..store.tensors import ADAPTERS, gate_name, kept_of, set_tensor, store_of, tensor_of
from ..store.unwrap import unwrapped
from .adding import allocate, fill
from .transitions import names_of, refuse_merged, refuse_slots, resident_of
from .widening import wide, widened


def reserved(
    gm: fx.GraphModule, state: State, slots: int, max_rank: int | None
) -> tuple[fx.GraphModule, dict[str, Resident]]:
    """(module, not yet its graph, with tensors and gates for all slots; what is in each). Those that are active are open."""
    refuse_merged(state, "reserve")
    refuse_slots(state, "reserve", "it has slots already")
    if not state.recipe:
        raise GraphError("reserve needs an adapter whose targets and method the slots follow: apply or load one first")
    if not isinstance(slots, int) or slots < len(state.recipe):
        raise GraphError(f"slots={slots!r}: expected at least the number of resident adapters, {len(state.recipe)}")
    new = widened(gm, state, max_rank)
    recipe = {n: r.update(name=n, room=wide(r.config, max_rank)) for n, r in state_of(new).recipe.items()}
    first = next(iter(recipe.values()))
    room = first.room or first.config
    free = [f"slot{i}" for i in range(slots) if f"slot{i}" not in recipe][: slots - len(recipe)]
    recipe |= {slot: resident_of(state, slot, room, first.lowering, room=room) for slot in free}
    for slot in free:
        allocate_slot(new, state.update(recipe=recipe), slot)
    for slot in recipe:
        set_gate(new, slot, slot in state.active)
    return new, recipe


def moved(state: State, slot: str, name: str) -> State:
    """A free slot under another name, at its place in the order."""
    there = state.recipe[slot]
    own = resident_of(state, name, there.config, there.lowering, room=there.room, home=there.home)
    return state.update(
        recipe={name if place == slot else place: own if place == slot else r for place, r in state.recipe.items()}
    )


def rename_slot(gm: fx.GraphModule, old: str, new: str) -> None:
    """The tensors and the gate of a slot under another name; what holds them does not notice."""
    for module in (store_of(gm).adapters._modules, store_of(gm).gates._modules):
        module[new] = module.pop(old)


def fresh(gm: fx.GraphModule, chosen: Iterable[Placement]) -> dict[str, torch.Tensor]:
    """Full name -> what a free slot's tensor holds, but for targets whose base weight is not there."""
    made: dict[str, torch.Tensor] = {}
    with torch.random.fork_rng(devices=()):
        for p in chosen:
            if kept_of(gm, p.target.name).device.type == "meta":
                continue
            for name in p.tensors:
                if name not in p.shared:
                    tensor = torch.empty_like(tensor_of(gm, f"{ADAPTERS}.{p.state_name(name)}"))
                    fill(tensor, gm, p, name, None, made)
                    made[p.state_name(name)] = tensor
    return {f"{ADAPTERS}.{name}": tensor for name, tensor in made.items()}


def allocate_slot(gm: fx.GraphModule, state: State, slot: str) -> None:
    """Registers the tensors of a free slot."""
    store_of(gm).adapters._modules.pop(slot, None)
    for placement in state.recipe[slot].placements:
        allocate(gm, placement, None, trainable=False)


def set_gate(gm: fx.GraphModule, slot: str, weight: float) -> None:
    """Registers a gate of the graph module's own."""
    set_tensor(gm, gate_name(slot), torch.tensor(float(weight), device=store_of(gm).device()))


def with_slots(tuned: fx.GraphModule, verb: str) -> tuple[fx.GraphModule, State]:
    """The graph module and its state. Raises GraphError if it has no slots."""
    gm = unwrapped(tuned)
    state = state_of(gm, verb)
    if not state.gated:
        raise GraphError(
            f"{verb}: this graph has no slots: make one with peft_fx.reserve(tuned, slots=...) before compiling"
        )
    return gm, state


def slot_for(state: State, name: str) -> str:
    """The resident adapter whose tensors a swap overwrites: of that name, or a free slot for a new name."""
    if not state.gated or name in state.residents:
        return names_of(state, name)[0]
    check_adapter_name(name)
    free = next((slot for slot, resident in state.recipe.items() if resident.name is None), None)
    if free is None:
        raise HotswapError(
            f"no slot is free for adapter {name!r}; taken: {', '.join(state.residents)}. Free one with "
            "peft_fx.release(graph, name), or swap into one of these names"
        )
    return free


def refuse_taken(state: State, slot: str, name: str) -> None:
    """Raises HotswapError if the slot that a swap was prepared for holds another adapter by now, or its name is elsewhere."""
    now = state.recipe[slot].name
    if state.gated and (now not in (None, name) or state.residents.get(name, slot) != slot):
        raise HotswapError(
            f"adapter {name!r}: the slot that this swap was prepared for holds {now!r} now, resident: "
            f"{', '.join(state.residents)}; prepare it again"
        )
