"""A hotswap where the adapter is merged: fold the kept base weights anew, copy the results into the folded tensors.

    kept base weights, the other merged adapters, the new one -> `folded` target by target -> checks -> copy_

Everything is computed before the first write. The results wait where the kept base weights do, so the peak is one weight on
the graph's device for keep_base="cpu", and the folded weights once more for "device". The bits are those of merging anew.
Packed weights are kept as the merge was told to keep them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx, nn

from ..errors import MergeError, RecipeError
from ..methods.base import block_diagonal
from ..passes.inject.inject import lower
from ..storage.packed import Packed
from ..store.modules import shell
from ..store.state import Resident, State, base_of, state_of
from ..store.tensors import REPLACED, ROOT, copy_all, find_kept, get_tensor, kept_of, set_kept, store_of
from ..target import ModuleTable, Target, sizes
from .adding import allocate
from .inplace import MODEL, write
from .merging import by_target, folded
from .replaced import equal, moved, restored, shelve, shelved, stays_tied
from .transitions import mergeable, only_one_with_biases, resident_of, swapped, unmerged

Kept = torch.Tensor | Packed


ANEW = "merge this adapter from the unmerged graph"
# how packed weights were kept -> why a swap cannot keep them so
NO_WAY = {
    None: "it is packed and would change, and the merge before did not say how it is to be kept",
    "calibrated": "it was packed again with storage='calibrated', whose activations are not kept",
}


@dataclass(frozen=True)
class Fold:
    """What a swap is going to change in every graph over the same folded tensors, those of packed weights one by one.

    writes: name -> (folded tensor, what it becomes). first: name of a weight that no merge has replaced yet -> (the base's, where
    it is kept; the folded one), packed ones whole. padded: how many results are less than their tensor holds. adapter: the new
    one's tensors.
    """

    writes: dict[str, tuple[torch.Tensor, torch.Tensor]]
    first: dict[str, tuple[Kept, Kept]]
    padded: int
    adapter: nn.Module
    resident: Resident
    report: tuple[dict, ...]


def refold(gm: fx.GraphModule, state: State, adapter: str, config, values: dict) -> tuple[list, int, tuple[str, ...]]:
    """Puts another adapter in the place of a merged one: `config`, and `values` as `match_tensors` gives them.

    Returns the tensors written, how many of them hold less than they could, and the targets that the new adapter leaves out.
    Raises MergeError or RecipeError, and has changed nothing then.
    """
    old = {p.target.name for p in state.recipe[adapter].placements}
    fold = computed(gm, state, adapter, config, values)
    sharing, in_model = store_of(gm).sharing, MODEL in gm.meta
    graphs = [g for g in {gm, *sharing.all()} if state_of(g).merge_report is state.merge_report]
    written = [t for t, _ in fold.writes.values()]
    written += [
        t for _, new in fold.first.values() for t in (new.tensors.values() if isinstance(new, Packed) else [new])
    ]
    with sharing.writing(written), torch.no_grad():
        if in_model:
            write(gm, state, {name: value for name, (_, value) in (fold.writes | fold.first).items()})
        else:
            copy_all(fold.writes.values())
            for graph in graphs:
                for name, (kept, value) in fold.first.items():
                    set_kept(graph, f"{REPLACED}.{name}", kept, persistent=False)
                    set_kept(graph, name, value)
        for graph in graphs:
            store_of(graph).adapters._modules[adapter] = shell(fold.adapter)
            if not in_model:
                shelve(graph, (adapter,))
            graph.meta[ROOT] = swapped(state_of(graph), adapter, fold.resident).update(merge_report=fold.report)
    new = {p.target.name for p in state_of(gm).recipe[adapter].placements}
    return written, fold.padded, tuple(sorted(old - new))


def computed(gm: fx.GraphModule, state: State, adapter: str, config, values: dict) -> Fold:
    """All results, checked, in a graph module of their own."""
    old = state.recipe[adapter]
    if config.layer_replication != old.config.layer_replication:
        raise RecipeError("layer_replication changes the base model: load this adapter into a graph of its own")
    only_one_with_biases(state, adapter, config)
    lowering = old.lowering if config.peft_type == old.config.peft_type else "auto"
    resident = resident_of(state, adapter, config, lowering, name=old.name, room=old.room and config)
    new = swapped(unmerged(state), adapter, resident)
    mergeable(new, state.merged)
    chosen = new.placed(state.merged)
    refuse_what_cannot_be_unmerged(new)

    scratch = restored(gm, state, move=False)
    adapters = store_of(scratch).adapters
    trainable = any(t.requires_grad for t in adapters.get_submodule(adapter).parameters())
    adapters._modules[adapter] = nn.Module()
    for p in resident.placements:
        read = {t.tensor_name for spec in p.tensors.values() for t in (p.target, *spec.sources)}
        with brought(scratch, gm, read):
            allocate(scratch, p, values, trainable)
    waits, storage = waiting_device(gm), next((r["storage"] for r in state.merge_report if r.get("storage")), None)
    names, report, groups = dict.fromkeys(shelved(gm)), [], by_target(chosen)
    for group in groups.values():
        target = group[0].target
        with brought(scratch, gm, (target.name, target.bias_name)):
            results, line = folded(
                scratch, group, check_finite=True, storage=None if storage == "calibrated" else storage
            )
        if line.get("change") and storage in (None, "calibrated"):
            raise MergeError(f"{target.name}: {NO_WAY[storage]}; {ANEW}")
        for name, result in results.items():
            set_kept(scratch, name, result if waits is None else moved(result, waits))
        names |= dict.fromkeys(results)
        report.append(line)

    finals = {name: find_kept(scratch, name) for name in names}
    keep_ties(gm, scratch, finals, groups, state.table)
    targets = {p.target.name: p.target for p in (*state.placed(state.merged), *chosen)}
    writes: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    first: dict[str, tuple[Kept, Kept]] = {}
    padded, seen = 0, dict[int, Any]()
    for name, final in finals.items():
        value = fitted(name, final, find_kept(gm, name), targets.get(name))
        now = kept_of(gm, name)
        padded += final is None or value.shape != final.shape
        if name in shelved(gm):
            if id(now) not in seen:
                writes |= changes(name, now, value)
            seen[id(now)] = now
        else:
            if id(now) not in seen:
                kept, own = (now if waits is None else moved(now, waits)), moved(value, now.device)
                parameter = isinstance(now, nn.Parameter) and isinstance(own, torch.Tensor)
                seen[id(now)] = kept, nn.Parameter(cast(torch.Tensor, own), requires_grad=False) if parameter else own
            first[name] = seen[id(now)]
    return Fold(writes, first, padded, adapters.get_submodule(adapter), resident, tuple(report))


def changes(name: str, now: Kept, value: Kept) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """What is written to give a folded weight its value. Of packed numbers those that differ: the others may be the base's."""
    if not isinstance(now, Packed) or not isinstance(value, Packed):
        return {name: (cast(torch.Tensor, now), cast(torch.Tensor, value))}
    pairs = zip(now.named(name).items(), value.tensors.values(), strict=True)
    return {key: (tensor, new) for (key, tensor), new in pairs if not equal(new, tensor)}


def refuse_what_cannot_be_unmerged(state: State) -> None:
    """An adapter whose dropout, say, has no form in the graph could be folded, and never come back."""
    base = base_of(state)
    refused = [x for x in lower(base.graph, state.placed(state.acting), base.traces) if x.form == "refused"]
    if refused:
        raise RecipeError(
            f"{refused[0].placement.target.name}: refused, since unmerge could not bring it: {refused[0].reason}"
        )


def waiting_device(gm: fx.GraphModule) -> torch.device | None:
    """Where replaced weights wait, if not on the graph's device."""
    devices = ((kept.device, kept_of(gm, name).device) for name, kept in shelved(gm).items() if kept.shape.numel())
    return next((kept for kept, now in devices if kept != now), None)


@contextlib.contextmanager
def brought(scratch: fx.GraphModule, gm: fx.GraphModule, names: Iterable[str]) -> Iterator[None]:
    """Inside the block the weights are on the device of `gm`."""
    away = {}
    for name in names:
        kept, now = find_kept(scratch, name), find_kept(gm, name)
        if kept is not None and now is not None and kept.device != now.device:
            away[name] = kept
            set_kept(scratch, name, moved(kept if isinstance(kept, Packed) else kept.detach(), now.device))
    yield
    for name, kept in away.items():
        set_kept(scratch, name, kept)


def keep_ties(gm, scratch, finals: dict[str, Kept | None], groups: dict, table: ModuleTable) -> None:
    """Names that share one tensor now get equal numbers. Raises MergeError where they would differ."""
    for tie in table.tied:
        owners: dict[int, str] = {}
        for name in sorted((n for n in tie if get_tensor(gm, n) is not None), key=lambda n: n not in finals):
            now = get_tensor(gm, name)
            owner = owners.setdefault(id(now), name)
            if owner == name or owner not in finals:
                continue
            if name in finals and stays_tied(scratch, groups, owner, name):
                finals[name] = finals[owner]
            elif not equal(finals[owner], finals.get(name, now)):
                raise MergeError(
                    f"{owner}: refused: the folded weight is tied to {name}, which would change with it; "
                    "merge this adapter from the unmerged graph, with untie=True"
                )


def fitted(name: str, final: Kept | None, now: Kept | None, target: Target | None) -> Kept:
    """`final` as the folded operator's tensor `now` holds it: zeros for a bias that is no more, or between groups."""
    if now is None:
        raise MergeError(f"{name}: the folded operator has no bias to write to, and the new adapter brings one; {ANEW}")
    if isinstance(now, Packed):
        if not isinstance(final, Packed):
            raise MergeError(f"{name}: the folded operator reads it packed, and a dense weight is to come; {ANEW}")
        return final
    if isinstance(final, Packed):  # the base's own again
        final = final.dense()
    if final is None:
        return torch.zeros_like(now)
    if final.shape == now.shape:
        return final
    dense = (target.out_features, target.in_features) if target is not None and target.groups > 1 else None
    if target is not None and dense == tuple(now.shape[:2]):
        return block_diagonal(final, target.groups)
    if target is not None and dense == tuple(final.shape[:2]):
        raise MergeError(
            f"{name}: the folded operator has groups={target.groups}, across which the update goes; {ANEW}"
        )
    raise MergeError(f"{name}: shape {sizes(final.shape)} does not fit the folded tensor {sizes(now.shape)}; {ANEW}")
