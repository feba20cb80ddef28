"""Merges in a model that stays the object it is: its Parameters get other numbers, and their own ones wait on the shelf.

The graph module of such a model runs nothing: `gm.meta["peft_fx_model"]` is the model, whose tensors it has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import fx, nn

from ..planning.plan import Placement
from ..storage.packed import SUFFIX, Packed
from ..storage.recognise import recognise
from ..storage.schemes import scheme
from ..store.state import State, state_of
from ..store.tensors import (
    REPLACED,
    ROOT,
    copy_all,
    get_tensor,
    owner_of,
    packed_of,
    set_packed,
    set_tensor,
    store_of,
    tensor_of,
)
from .merging import by_target, folded
from .replaced import restored, shelved
from .transitions import mergeable, merged, unmerged

MODEL = "peft_fx_model"
Kept = torch.Tensor | Packed


def merge_in_place(gm: fx.GraphModule, places: tuple[str, ...], check_finite: bool, shown: Callable[[Iterable], Iterable],
                   then: Callable[[], None]) -> list[dict]:  # fmt: skip
    """Folds further adapters, with those that are merged already, from the base's own numbers: one rounding for all.

    Packed weights are packed again. shown: around the targets, for progress. then: runs before any call sees the result. Returns
    the report, a line per target. Raises MergeError, and has changed nothing then.
    """
    state = state_of(gm)
    mergeable(state, places)
    source = restored(gm, state) if state.merged else gm
    results, report = all_folded(
        source, shown(by_target(state.placed((*state.merged, *places))).values()), check_finite
    )
    with store_of(gm).sharing.writing(tensors_of(results)), torch.no_grad():
        write(gm, state, results)
        gm.meta[ROOT] = merged(state, places, report)
        then()
    return report


def fold_again(gm: fx.GraphModule, chosen: Iterable[Placement], check_finite: bool) -> None:
    """Merged placements, all that are on their targets, with the numbers that the adapters have now."""
    state = state_of(gm)
    results, _ = all_folded(restored(gm, state), by_target(chosen).values(), check_finite)
    with store_of(gm).sharing.writing(tensors_of(results)), torch.no_grad():
        write(gm, state, results)


def tensors_of(kept: dict[str, Kept]) -> list[torch.Tensor]:
    """All tensors of weights, dense or packed."""
    return [t for value in kept.values() for t in (value.tensors.values() if isinstance(value, Packed) else [value])]


def all_folded(
    source: fx.GraphModule, groups: Iterable[list[Placement]], check_finite: bool
) -> tuple[dict[str, Kept], list[dict]]:
    """What merging the placements of each target gives: tensor name -> result, and the lines of the report."""
    results: dict[str, Kept] = {}
    report = []
    for group in groups:
        found, line = folded(source, group, check_finite, storage="requantize")
        results |= found
        report.append(line)
    return results, report


def unmerge_in_place(gm: fx.GraphModule, then: Callable[[], None]) -> None:
    """The model's tensors as they were before the merge, bit for bit."""
    state = unmerged(state_of(gm))
    shelf = shelved(gm)
    with store_of(gm).sharing.writing(tensors_of(shelf)), torch.no_grad():
        for name, kept in shelf.items():
            if isinstance(kept, Packed):
                place(gm, name, kept)
            elif isinstance(kept, nn.Parameter):
                put(gm, name, kept)
            elif kept.numel() == 0:  # the merge added this one
                put(gm, name, None)
            else:
                tensor_of(gm, name).copy_(kept)
        store_of(gm).replaced = nn.Module()
        gm.meta[ROOT] = state
        then()


def write(gm: fx.GraphModule, state: State, values: dict[str, Kept]) -> None:
    """Name -> value in place of the model's tensors, all of them or none; what they were is on the shelf, unless it is there."""
    undo: list[Callable[[], object]] = []
    try:
        for name, value in values.items():
            if isinstance(value, Packed):
                undo.append(pack(gm, name, value))
            else:
                undo.append(step(gm, state, name, get_tensor(gm, name), value))
    except BaseException:
        for back in reversed(undo):
            back()
        raise


def step(
    gm: fx.GraphModule, state: State, name: str, old: torch.Tensor | None, value: torch.Tensor
) -> Callable[[], object]:
    """Writes one tensor; returns what takes it back."""
    shelf = f"{REPLACED}.{name}"
    new = get_tensor(gm, shelf) is None
    if old is not None and old.shape == value.shape and not state.table.tied_to(name):
        now = old.detach().clone()
        if new:
            set_tensor(gm, shelf, now, persistent=False)
        old.copy_(value)

        def back() -> None:
            old.copy_(now)
            if new:
                drop(gm, shelf)

        return back
    # a weight that others share, a bias that there was none of, a convolution that loses its groups
    if new:
        set_tensor(gm, shelf, value.new_empty(0) if old is None else old, persistent=False)
    put(gm, name, nn.Parameter(value, requires_grad=False))

    def put_back() -> None:
        put(gm, name, old)
        if new:
            drop(gm, shelf)

    return put_back


def pack(gm: fx.GraphModule, name: str, value: Packed) -> Callable[[], object]:
    """Gives a packed weight other numbers; returns what takes that back."""
    shelf, own = f"{REPLACED}.{name}", cast(Packed, packed_of(gm, name))
    before = own.again({n: t.detach().clone() for n, t in own.tensors.items()}, persistent=False)
    if new := name not in shelved(gm):
        set_packed(gm, shelf, before)
    back = place(gm, name, value)

    def put_back() -> None:
        back()
        if new:
            owner, leaf = owner_of(gm, shelf)
            del owner._modules[leaf + SUFFIX]

    return put_back


def place(gm: fx.GraphModule, name: str, value: Packed) -> Callable[[], object]:
    """Packed numbers into the model's layer: into its tensors, where these are what was read of it. Returns the way back."""
    module, leaf = owner_of(gm.meta[MODEL], name)
    own, held = cast(Packed, packed_of(gm, name)), cast(Packed, recognise(module, leaf))
    pairs = zip(own.tensors.values(), held.tensors.values(), strict=True)
    if all(a.data_ptr() == b.data_ptr() for a, b in pairs):
        before = [t.clone() for t in own.tensors.values()]
        copy_all(zip(own.tensors.values(), value.tensors.values(), strict=True))
        return lambda: copy_all(zip(own.tensors.values(), before, strict=True))
    undo = scheme(own.format.scheme).place(module, leaf, value)
    set_packed(gm, name, cast(Packed, recognise(module, leaf)))

    def back() -> None:
        undo()
        set_packed(gm, name, own)

    return back


def drop(gm: fx.GraphModule, name: str) -> None:
    owner, leaf = owner_of(gm, name)
    del owner._buffers[leaf]


def put(gm: fx.GraphModule, name: str, parameter: torch.Tensor | None) -> None:
    """Another Parameter under a name of the model's, None to take it away."""
    model = gm.meta[MODEL]
    for root in (model, gm):
        place, leaf = owner_of(root, name)
        place._parameters[leaf] = cast("nn.Parameter | None", parameter)
    owner: Any = owner_of(model, name)[0]
    if parameter is not None and parameter.dim() > 2 and hasattr(owner, "groups"):
        owner.groups = owner.in_channels // parameter.shape[0 if owner.transposed else 1]
