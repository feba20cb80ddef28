"""`merge` and `unmerge`: constant folding of the tagged cones, one target at a time.

    W_merged = round(f_k(... f_1(float32(W)) ...))        one rounding, into the weight's own name

The functions are called, not the graph: a graph traced in bf16 has its casts as literals and cannot fold in fp32. Unmerge
puts the replaced tensors back, so it changes no bit. How a packed weight is kept is asked for (`engine/storing.py`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import fx

from ..engine import transitions
from ..engine.calibrating import visit
from ..engine.derive import acted, acting_again, injection
from ..engine.forecasting import Forecast, forecast
from ..engine.memory import Memory
from ..engine.merging import acting_whole, by_target, folded
from ..engine.replaced import refuse_or_keep_ties, replace_tensor, restored, shelve
from ..engine.storing import STORAGES
from ..engine.transitions import mergeable, names_of
from ..errors import MergeError
from ..passes.core.base import run
from ..passes.inject.fold import PointAtFolded
from ..planning.plan import Placement
from ..store.modules import derive, reading
from ..store.state import State, base_of, state_of
from ..store.tensors import ROOT, get_tensor, weight_of
from ..tables import counted

KEEP = ("device", "cpu", None)


def merge(
    tuned: fx.GraphModule,
    adapter_names: str | list[str] | None = None,
    *,
    storage: str | None = None,
    activations: Iterable[Any] | None = None,
    check_finite: bool = True,
    keep_base: str | None = "device",
    untie: bool = False,
) -> fx.GraphModule:
    """Folds adapters into the weights; the result has the model's own operators and state-dict names.

    adapter_names: which, in order; None: the active ones. Active adapters that are not named stay in the graph.
    storage: what becomes of packed weights that change; there is no default. "dense": weights of the layers' compute dtype.
    "requantize": packed again, which at 4 bits may lose all that the adapters do, as `merge_report` says beforehand.
    "calibrated": packed again so that products with `activations` stay. activations: batches of the graph's inputs, each a
    dict or a tuple; with "requantize" they measure what is lost. check_finite: refuse results with inf or nan. keep_base: where
    the replaced weights wait for `unmerge`: "device", "cpu", or None to drop them. untie: give a tied weight a tensor of its own
    where only one of its names is adapted.

    Computed in fp32 or wider and rounded once; peak memory is one weight over the result, for "calibrated" the batches and one
    matrix (in, in) more. `explain(merged)` has the rounding error per target. Raises MergeError naming the target; nothing has
    changed then.
    """
    state_of(tuned, "merge")
    if storage not in (None, *STORAGES):
        raise MergeError(f"storage={storage!r}: expected one of {STORAGES}")
    if storage == "calibrated" and activations is None:
        raise MergeError("storage='calibrated' needs activations=, a list of batches that the graph is called with")
    if keep_base not in KEEP:
        raise MergeError(f"keep_base={keep_base!r}: expected one of {KEEP}")
    with reading(tuned):
        measured = activations is not None and storage != "dense"
        begun = begin(tuned, adapter_names, check_finite, keep_base, untie, None if measured else storage)
        if storage is None:
            refuse_unasked(tuned, begun)
        return finished(tuned, begun, check_finite, keep_base, storage, activations)


@dataclass(frozen=True)
class Begun:
    """A merge on its way. graph: with everything folded but the weights of `waiting`, which are packed. report: by target."""

    graph: fx.GraphModule
    state: State
    report: dict[str, dict]
    waiting: dict[str, list[Placement]]


def begin(
    tuned: fx.GraphModule,
    adapter_names: str | list[str] | None,
    check_finite: bool,
    keep_base: str | None,
    untie: bool,
    storage: str | None,
) -> Begun:
    """Folds what need not wait: with a storage, all; without, packed weights that change wait."""
    state = state_of(tuned)
    if state.mixed:
        raise MergeError("merge on a graph for mixed batches: use the graph that peft_fx.mixed_batch made it from")
    if state.merged:
        raise MergeError(f"adapters {', '.join(state.called(state.merged))} are merged already; unmerge first")
    names = acting_whole(tuned, state) if adapter_names is None else names_of(state, adapter_names)
    mergeable(state, names)
    chosen = state.placed(names)
    before = acted(tuned, state) if keep_base else None
    new = derive(tuned, fx.Graph(), state)
    new._keep(base_of(state).graph)
    report, groups = {}, by_target(chosen)
    dense = [get_tensor(new, name) for name in groups]
    memory = Memory(W for W in dense if W is not None)
    for W, group in zip(dense, groups.values(), strict=True):
        results, line = folded(new, group, check_finite, None if W is None else memory.like(W), storage)
        for name, result in results.items():
            replace_tensor(new, name, result, keep_base)
        report[line["target"]] = line
    refuse_or_keep_ties(tuned, new, state, groups, untie)
    waiting = {name: group for name, group in groups.items() if storage is None and report[name].get("change")}
    state = transitions.merged(state, names, report.values(), acted=before)
    new.meta[ROOT] = state
    reports = run((PointAtFolded(chosen), *injection(state)), new)
    return Begun(new, state.update(reports=reports), report, waiting)


def finished(
    tuned: fx.GraphModule,
    begun: Begun,
    check_finite: bool,
    keep_base: str | None,
    storage: str | None,
    activations: Iterable[Any] | None,
) -> fx.GraphModule:
    """The merged graph, once the weights that wait are kept as `storage` says."""
    new, report = begun.graph, begun.report

    def keep(name: str, H: torch.Tensor | None) -> torch.Tensor:
        results, line = folded(tuned, begun.waiting[name], check_finite, storage=storage, H=H)
        replace_tensor(new, name, results[name], keep_base)
        report[name] = line
        return weight_of(new, name)

    visit(new, {name: group[0].target for name, group in begun.waiting.items()}, activations, keep)
    lines = tuple({**line, "storage": storage} if "storage" in line else line for line in report.values())
    new.meta[ROOT] = begun.state.update(merge_report=lines)
    shelve(new, begun.state.merged)
    return new


def refuse_unasked(tuned: fx.GraphModule, begun: Begun) -> None:
    """Raises MergeError with a forecast where packed weights would change: how they are kept is no matter of defaults."""
    if rows := [forecast(tuned, group)[0] for group in begun.waiting.values()]:
        raise MergeError(
            f"{counted(len(rows), 'packed weight')} would change, {rows[0].target} first: {told(rows)}. Merge with "
            f"storage='dense' ({sum(r.dense for r in rows) / sum(r.packed for r in rows):.1f} x the bytes), 'requantize', or "
            "'calibrated' with activations=; peft_fx.merge_report(tuned) shows each"
        )


def told(rows: list[Forecast]) -> str:
    """What packing again loses, in words."""
    known = {row.requantize: row for row in rows if row.requantize is not None}
    if not known:
        return f"they cannot be packed again ({rows[0].reason})"
    worst = max(known)
    middle = median(row.requantize for row in known.values() if row.requantize is not None)
    return f"packing them again loses {middle:.2f} of the change (median; {worst:.2f} at {known[worst].target})"


def unmerge(merged: fx.GraphModule) -> fx.GraphModule:
    """The graph as before the merge, bit for bit: replaced weights under their names, merged adapters active again.

    Raises MergeError if the merge dropped them (keep_base=None).
    """
    new = restored(merged, state_of(merged, "unmerge"))
    return acting_again(new, state_of(new))
