"""`merge` and `unmerge`: constant folding of the tagged cones, one target at a time.

    W_merged = round(f_k(... f_1(float32(W)) ...))        one rounding, into the weight's own name

The functions are called, not the graph: a graph traced in bf16 has its casts as literals and cannot fold in fp32. Unmerge
puts the replaced tensors back, so it changes no bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial

import torch
from torch import fx, nn

from ..errors import MergeError
from ..methods.base import Additive, Method
from ..passes.base import run
from ..passes.fold import PointAtFolded
from ..passes.lowering import apply_weight, to_canonical
from ..planning.kinds import one_line_each
from ..planning.plan import Placement, clashes
from ..store import ADAPTERS, REPLACED, State, derive, get_tensor, owner_of, set_tensor, state_of
from .derive import acted, acting, acting_again, injection, names_of, placements
from .memory import Memory
from .placed import put

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
    state = state_of(tuned, "merge")
    if state.mixed:
        raise MergeError("merge on a graph for mixed batches: use the graph that peft_fx.mixed_batch made it from")
    if state.merged:
        raise MergeError(f"adapters {', '.join(state.called(state.merged))} are merged already; unmerge first")
    if keep_base not in KEEP:
        raise MergeError(f"keep_base={keep_base!r}: expected one of {KEEP}")
    names = acting_whole(tuned, state) if adapter_names is None else names_of(state, adapter_names)
    if not names:
        raise MergeError("nothing to merge: no adapter is active; name one, or call set_adapter")
    chosen = [p for name in names for p in placements(state, name)]
    refuse_no_weight(chosen)
    if refused := clashes(chosen):
        raise MergeError("\n".join(one_line_each(refused)))
    before = acted(tuned, state) if keep_base else None
    new = derive(tuned, fx.Graph(), state)
    new._keep(state.base.graph)
    report, groups = [], by_target(chosen)
    memory = Memory(get_tensor(new, name) for name in groups)
    for name, group in groups.items():
        results, line = folded(new, group, check_finite, memory.like(get_tensor(new, name)))
        for name, result in results.items():
            replace_tensor(new, name, result, keep_base)
        report.append(line)
    refuse_or_keep_ties(tuned, new, state, groups, untie)
    left = tuple(n for n in state.active if n not in names)
    state = state.update(active=left, merged=names, before_merge=state.active, acted=before, merge_report=tuple(report))
    new.meta["peft_fx"] = state
    reports = run((PointAtFolded(tuple(chosen)), *injection(state)), new)
    new.meta["peft_fx"] = state.update(reports=reports)
    shelve(new, names)
    return new


def acting_whole(tuned: fx.GraphModule, state: State) -> tuple[str, ...]:
    """The adapters that act. Raises MergeError where a gate lets only a part of one through."""
    if not state.gated:
        return state.active
    weights = acting(tuned, state)
    if part := next((slot for slot, weight in weights.items() if weight != 1), None):
        raise MergeError(
            f"adapter {state.recipe[part].name!r} acts with weight {weights[part]}: switch it to 1 and merge then"
        )
    return tuple(name for name in state.active if name in weights)


def refuse_no_weight(chosen: list[Placement]) -> None:
    for p in chosen:
        if reason := p.rule.no_weight:
            raise MergeError(f"{p.target.name}: refused: {p.method} cannot be merged: {reason}")


def by_target(chosen: list[Placement]) -> dict[str, list[Placement]]:
    """Parameter name -> its placements, in order; an adapter's own bias goes with the weight that may change it again."""
    groups: dict[str, list[Placement]] = {}
    for p in chosen:
        groups.setdefault(p.target.name, []).append(p)
    return groups


def folded(
    gm: fx.GraphModule, group: list[Placement], check_finite: bool, place: torch.Tensor | None = None
) -> tuple[dict[str, torch.Tensor], dict]:
    """What merging the placements of one target gives: tensor name -> result, and its line of the report.

    place: memory for the weight, where it keeps its shape.
    """
    target = group[0].target
    W = get_tensor(gm, target.name)
    b = get_tensor(gm, target.bias_name) if target.has_bias else None
    wide = torch.promote_types(W.dtype, torch.float32) if W.is_floating_point() else W.dtype
    with torch.no_grad():
        exact_W, exact_b = W.detach(), None if b is None else b.detach()
        old_b = exact_b
        operands = {t.untyped_storage()._cdata for t in (W, b) if t is not None}
        for p in group:
            method, theta = p.rule, theta_of(gm, p)
            operands |= {t.untyped_storage()._cdata for t in theta.values()}
            dense, weight = method.dense_groups(p.target), method.weight
            last = p is group[-1] and wide == W.dtype and not dense and exact_W.shape == W.shape
            if last and writes_in_place(method):
                place = torch.empty_like(W, memory_format=torch.contiguous_format) if place is None else place
                weight = partial(weight, out=to_canonical(place, p.target))
            exact_W, exact_b = apply_weight(weight, exact_W, exact_b, theta, p.target, p.config, wide, dense)
        results = {target.name: rounded(exact_W, W.dtype, operands, place)}
        if exact_b is not old_b:
            results[target.bias_name] = rounded(exact_b, W.dtype if b is None else b.dtype, operands)
        for name, result in results.items():
            if check_finite and not finite(result):
                adapters = ", ".join(p.adapter for p in group)
                raise MergeError(f"{name}: merging {adapters} gives inf or nan in {result.dtype}; nothing was merged")
        error = rounding_error(results[target.name], exact_W)
    adapters = [p.adapter for p in group]
    return results, {"target": target.name, "adapters": adapters, "dtype": str(W.dtype), "rounding_error": error}


def writes_in_place(method: Method) -> bool:
    """Whether the method's `weight` takes the memory for its result."""
    return getattr(method.weight, "__func__", None) is Additive.weight


def rounded(exact: torch.Tensor, dtype: torch.dtype, operands: set, place: torch.Tensor | None = None) -> torch.Tensor:
    """`exact` in `dtype`, contiguous, in memory of its own: a substituted weight is the adapter's tensor itself."""
    if place is not None and place.shape == exact.shape:
        return place if place.data_ptr() == exact.data_ptr() else place.copy_(exact)
    result = exact.to(dtype).contiguous()
    return result.clone() if result.untyped_storage()._cdata in operands else result


def finite(tensor: torch.Tensor) -> bool:
    """Whether all elements are. A finite sum has finite terms; an infinite one may be too many of them, so extremes decide."""
    if not tensor.numel() or not tensor.is_floating_point():
        return True
    return math.isfinite(tensor.sum()) or all(math.isfinite(x) for x in tensor.aminmax())


def rounding_error(result: torch.Tensor, exact: torch.Tensor) -> float:
    """Greatest difference that rounding to the weight's dtype made."""
    if result.dtype == exact.dtype or not result.numel():
        return 0.0
    return float((result.to(exact.dtype) - exact).abs().max())


def theta_of(gm: fx.GraphModule, p: Placement) -> dict[str, torch.Tensor]:
    """A placement's tensors by name."""
    theta = {}
    for name in p.tensors:
        shared = p.resolve(name)
        tensor = get_tensor(gm, f"{ADAPTERS}.{shared.name}").detach()
        theta[name] = tensor.t() if shared.transposed else tensor
    return theta


def replace_tensor(gm: fx.GraphModule, name: str, value: torch.Tensor, keep_base: str | None) -> None:
    """Puts `value` under the model's own name and shelves what was there, unless it is shelved already."""
    old = get_tensor(gm, name)
    shelf = f"{REPLACED}.{name}"
    if keep_base and get_tensor(gm, shelf) is None:
        kept = old if old is not None else torch.empty(0, device=value.device)  # an empty one: there was none
        set_tensor(gm, shelf, kept.to("cpu") if keep_base == "cpu" else kept, persistent=False)
    is_parameter = old is None or isinstance(old, nn.Parameter)
    set_tensor(gm, name, nn.Parameter(value, requires_grad=False) if is_parameter else value)


def refuse_or_keep_ties(tuned, new, state: State, merged: dict[str, list[Placement]], untie: bool) -> None:
    """A tie survives if its names got equal weights; one that would break is refused unless asked for."""
    for group in state.table.tied:
        names = [n for n in group if get_tensor(tuned, n) is not None]
        if not set(names) & set(merged):
            continue
        first, *rest = names
        tensors = {n: get_tensor(new, n) for n in names}
        if all(stays_tied(tuned, merged, first, n) or equal(tensors[n], tensors[first]) for n in rest):
            for n in rest:
                set_tensor(new, n, tensors[first])
        elif not untie:
            changed = sorted(set(names) & set(merged))
            raise MergeError(
                f"{changed[0]}: refused: the weight is tied to {', '.join(n for n in names if n != changed[0])}, which would "
                "change with it; pass untie=True to give it a weight of its own"
            )


def stays_tied(gm: fx.GraphModule, merged: dict[str, list[Placement]], a: str, b: str) -> bool:
    """Whether two names of one weight have the same adapters' tensors: they get equal weights, but for rounding."""
    of_a, of_b = merged.get(a, []), merged.get(b, [])
    return len(of_a) == len(of_b) > 0 and all(same_numbers(gm, p, q) for p, q in zip(of_a, of_b, strict=True))


def same_numbers(gm: fx.GraphModule, p: Placement, q: Placement) -> bool:
    """Whether two placements of one adapter share their tensors, but for constants that are equal."""
    own = []
    for x, other in ((p, q), (q, p)):
        shared, theta = {other.resolve(n).name for n in other.tensors}, theta_of(gm, x)
        own.append({n: t for n, t in theta.items() if x.resolve(n).name not in shared})
    return (
        (p.adapter, p.method) == (q.adapter, q.method)
        and own[0].keys() == own[1].keys()
        and not any(p.tensors[n].trainable for n in own[0])
        and all(equal(own[0][n], own[1][n]) for n in own[0])
    )


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b.to(a.device))


def shelve(merged: fx.GraphModule, names: tuple[str, ...]) -> None:
    """Takes merged adapters out of parameters() and state_dict(), where the model's own names alone remain."""
    for name in names:
        tree = merged.peft_fx.adapters._modules.get(name)
        for module in tree.modules() if tree is not None else ():
            module._buffers.update(module._parameters)
            module._parameters.clear()
            module._non_persistent_buffers_set.update(module._buffers)


def unshelve(gm: fx.GraphModule, placed: Iterable[Placement]) -> None:
    """Puts a merged adapter's tensors back as the Parameters and buffers they were."""
    for p in placed:
        for name, spec in p.tensors.items():
            if name in p.shared:
                continue
            tensor = get_tensor(gm, f"{ADAPTERS}.{p.state_name(name)}")
            if spec.trainable and not isinstance(
                tensor, nn.Parameter
            ):  # .to() on a merged graph made a plain tensor of it
                tensor = nn.Parameter(tensor, requires_grad=tensor.requires_grad)
            put(gm, p, name, tensor)


def unmerge(merged: fx.GraphModule) -> fx.GraphModule:
    """The graph as before the merge, bit for bit: replaced weights under their names, merged adapters active again.

    Raises MergeError if the merge dropped them (keep_base=None).
    """
    state = state_of(merged, "unmerge")
    if not state.merged:
        raise MergeError("nothing to unmerge: no adapter is merged")
    new = restored(merged, state)
    return acting_again(new, state_of(new))


def restored(merged: fx.GraphModule, state: State, *, move: bool = True) -> fx.GraphModule:
    """The module, not yet its graph, with replaced weights and merged adapters as they were before the merge.

    move: weights that waited elsewhere come to the graph's device. Raises MergeError if they were not kept.
    """
    shelf = dict(merged.peft_fx.replaced.named_buffers(remove_duplicate=False))
    missing = [r["target"] for r in state.merge_report if r["target"] not in shelf]
    if missing:
        raise MergeError(
            f"{missing[0]}: the replaced weight was not kept (merge with keep_base=None or loaded from a file); "
            "derive from the unmerged graph, or merge with keep_base='device' or 'cpu'"
        )
    before = state.update(active=state.before_merge, merged=(), before_merge=(), merge_report=())
    new = derive(merged, fx.Graph(), before)
    back: dict[str, nn.Parameter | torch.Tensor] = {}  # first name of a tie -> the tensor that all its names get
    for name, kept in shelf.items():
        group = next((g for g in state.table.tied if name in g), (name,))
        untouched = next((n for n in group if n not in shelf and get_tensor(new, n) is not None), None)
        if kept.numel() == 0:  # the merge added this one
            owner, leaf = owner_of(new, name)
            del owner._parameters[leaf]
            continue
        if group[0] not in back:
            back[group[0]] = (
                as_it_was(kept, get_tensor(new, name), move) if untouched is None else get_tensor(new, untouched)
            )
        set_tensor(new, name, back[group[0]])
    new.peft_fx.replaced = nn.Module()
    for name in state.merged:
        unshelve(new, placements(state, name))
    return new


def as_it_was(kept: torch.Tensor, now: torch.Tensor, move: bool) -> torch.Tensor:
    """A shelved tensor back as the kind of tensor that it was, and on the device of the one in its place."""
    kept = kept.to(now.device) if move else kept
    if isinstance(now, nn.Parameter) and not isinstance(kept, nn.Parameter):
        return nn.Parameter(kept, requires_grad=False)
    return kept
