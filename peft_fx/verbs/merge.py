"""`merge` and `unmerge`: constant folding of the tagged cones, one target at a time.

    W_merged = round(f_k(... f_1(float32(W)) ...))        one rounding, into the weight's own name

The functions are called, not the graph: a graph traced in bf16 has its casts as literals and cannot fold in fp32. Unmerge
puts the replaced tensors back, so it changes no bit.
"""

from __future__ import annotations

from torch import fx

from ..engine import transitions
from ..engine.derive import acted, acting_again, injection
from ..engine.memory import Memory
from ..engine.merging import acting_whole, by_target, folded
from ..engine.replaced import refuse_or_keep_ties, replace_tensor, restored, shelve
from ..engine.transitions import mergeable, names_of
from ..errors import MergeError
from ..passes.core.base import run
from ..passes.inject.fold import PointAtFolded
from ..store.modules import derive, reading
from ..store.state import base_of, state_of
from ..store.tensors import ROOT, get_tensor

KEEP = ("device", "cpu", None)


def merge(
    tuned: fx.GraphModule,
    adapter_names: str | list[str] | None = None,
    *,
    check_finite: bool = True,
    keep_base: str | None = "device",
    untie: bool = False,
) -> fx.GraphModule:
    """Folds adapters into the weights; the result has the model's own operators and state-dict names.

    adapter_names: which, in order; None: the active ones. Active adapters that are not named stay in the graph.
    check_finite: refuse results with inf or nan. keep_base: where the replaced weights wait for `unmerge`: "device",
    "cpu", or None to drop them. untie: give a tied weight a tensor of its own where only one of its names is adapted.

    Computed in fp32 or wider and rounded once; peak memory is one weight over the result. `explain(merged)` has the
    rounding error per target. Raises MergeError naming the target; nothing has changed then.
    """
    state_of(tuned, "merge")
    with reading(tuned):
        return folded_graph(tuned, adapter_names, check_finite, keep_base, untie)


def folded_graph(
    tuned: fx.GraphModule, adapter_names: str | list[str] | None, check_finite: bool, keep_base: str | None, untie: bool
) -> fx.GraphModule:
    """What `merge` gives."""
    state = state_of(tuned)
    if state.mixed:
        raise MergeError("merge on a graph for mixed batches: use the graph that peft_fx.mixed_batch made it from")
    if state.merged:
        raise MergeError(f"adapters {', '.join(state.called(state.merged))} are merged already; unmerge first")
    if keep_base not in KEEP:
        raise MergeError(f"keep_base={keep_base!r}: expected one of {KEEP}")
    names = acting_whole(tuned, state) if adapter_names is None else names_of(state, adapter_names)
    mergeable(state, names)
    chosen = state.placed(names)
    before = acted(tuned, state) if keep_base else None
    new = derive(tuned, fx.Graph(), state)
    new._keep(base_of(state).graph)
    report, groups = [], by_target(chosen)
    dense = [get_tensor(new, name) for name in groups]
    memory = Memory(W for W in dense if W is not None)
    for W, group in zip(dense, groups.values(), strict=True):
        results, line = folded(new, group, check_finite, None if W is None else memory.like(W))
        for name, result in results.items():
            replace_tensor(new, name, result, keep_base)
        report.append(line)
    refuse_or_keep_ties(tuned, new, state, groups, untie)
    state = transitions.merged(state, names, report, acted=before)
    new.meta[ROOT] = state
    reports = run((PointAtFolded(chosen), *injection(state)), new)
    new.meta[ROOT] = state.update(reports=reports)
    shelve(new, names)
    return new


def unmerge(merged: fx.GraphModule) -> fx.GraphModule:
    """The graph as before the merge, bit for bit: replaced weights under their names, merged adapters active again.

    Raises MergeError if the merge dropped them (keep_base=None).
    """
    new = restored(merged, state_of(merged, "unmerge"))
    return acting_again(new, state_of(new))
