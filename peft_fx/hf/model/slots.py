"""Slots of a PeftModel: every call runs the adapters of all of them, each behind a gate; what acts is data."""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING

import torch
from torch import fx

from ...config import AdapterConfig
from ...engine.adding import Source, with_adapter
from ...engine.filing import adapter_files
from ...engine.slots import moved, rename_slot, reserved, slot_for
from ...store.modules import derive
from ...store.tensors import gate_name, tensor_of
from ...verbs.slots import release

if TYPE_CHECKING:
    from .tuner import Tuner


def in_slots(tuner: Tuner, slots: int, max_rank: int | None) -> None:
    """The adapters in slots, and free ones. All require grad if some did: a compiled call knows what requires grad."""
    new, recipe = reserved(tuner.backend.adapters, tuner.state, slots, max_rank)
    tuner.backend.keep(new)
    tuner.backend.become(tuner.state.update(recipe=recipe, gated=True))
    tuner.adapters.requires_grad_(any(p.requires_grad for p in tuner.adapters.parameters()))


def fill_slot(tuner: Tuner, name: str, config: AdapterConfig, source: tuple | None) -> None:
    """A new adapter into a free slot, in place; nothing has changed where it does not fit. source: None for initial values."""
    gm, before = tuner.backend.adapters, tuner.state
    if source is None or Source(*source).partial:
        alone = derive(gm, fx.Graph(), before.update(recipe={}, active=(), gated=False))
        made = with_adapter(alone, name, config, source, trainable=False, activate=False)
        source = adapter_files(made, name)[1], "its start", False
    slot = slot_for(before, name)
    tuner.backend.become(moved(before, slot, name))
    rename_slot(gm, slot, name)
    try:
        tuner.backend.hotswap((config, source[0]), name)
    except BaseException:
        tuner.backend.become(before)
        rename_slot(gm, name, slot)
        raise


def free_slot(tuner: Tuner, name: str) -> None:
    """An adapter's slot for others."""
    gm = tuner.backend.adapters
    tuner.backend.become(tuner.state.update(active=tuple(n for n in tuner.state.active if n != name)))
    release(gm, name)  # shuts its gate in the same write
    free = next(f"slot{i}" for i in count() if f"slot{i}" not in tuner.state.recipe)
    tuner.backend.become(moved(tuner.state, name, free))
    rename_slot(gm, name, free)


def write_gates(tuner: Tuner) -> None:
    """Those that act are open."""
    state = tuner.state
    gates = {place: tensor_of(tuner.backend.adapters, gate_name(place)) for place in state.recipe}
    with tuner.hosts.sharing.writing(gates.values()), torch.no_grad():
        for place, gate in gates.items():
            gate.fill_(float(place in state.acting))
