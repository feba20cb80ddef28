"""Weights of a graph module that a merge replaced, and how they come back, bit for bit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import fx, nn

from ..errors import MergeError
from ..planning.plan import Placement
from ..storage.packed import SUFFIX, Packed
from ..store.modules import derive
from ..store.state import State
from ..store.tensors import (
    ADAPTERS,
    REPLACED,
    find_kept,
    get_tensor,
    kept_of,
    owner_of,
    set_kept,
    set_packed,
    set_tensor,
    store_of,
    tensor_of,
)
from .merging import theta_of
from .placed import put
from .transitions import unmerged


def replace_tensor(gm: fx.GraphModule, name: str, value: torch.Tensor | Packed, keep_base: str | None) -> None:
    """Puts `value` under the model's own name and shelves what was there, unless it is shelved already."""
    old = get_tensor(gm, name)
    shelf = f"{REPLACED}.{name}"
    if keep_base and name not in shelved(gm):
        where = "cpu" if keep_base == "cpu" else value.device
        kept = find_kept(gm, name)
        set_kept(
            gm, shelf, moved(torch.empty(0) if kept is None else kept, where), persistent=False
        )  # empty: there was none
    if isinstance(value, Packed):
        set_packed(gm, name, value)
        return
    is_parameter = old is None or isinstance(old, nn.Parameter)
    set_tensor(gm, name, nn.Parameter(value, requires_grad=False) if is_parameter else value)


def refuse_or_keep_ties(tuned, new, state: State, merged: dict[str, list[Placement]], untie: bool) -> None:
    """A tie survives if its names got equal weights; one that would break is refused unless asked for."""
    for group in state.table.tied:
        names = [n for n in group if get_tensor(tuned, n) is not None]
        if not set(names) & set(merged):
            continue
        first, *rest = names
        tensors = {n: tensor_of(new, n) for n in names}
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


def equal(a: torch.Tensor | Packed | None, b: torch.Tensor | Packed | None) -> bool:
    """Whether two weights have equal numbers; packed ones that are two count as different."""
    if a is b or not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return a is b
    return a.shape == b.shape and torch.equal(a, b.to(a.device))


K = TypeVar("K", torch.Tensor, Packed, torch.Tensor | Packed)


def moved(kept: K, device: torch.device | str) -> K:
    """A weight on a device, dense or packed."""
    if isinstance(kept, Packed):
        return kept.again({name: tensor.to(device) for name, tensor in kept.tensors.items()})
    return kept.to(device)


def shelved(gm: fx.GraphModule) -> dict[str, torch.Tensor | Packed]:
    """Tensor name -> what a merge replaced there."""
    replaced = store_of(gm).replaced
    named = replaced.named_modules(remove_duplicate=False)
    packed = {name.removesuffix(SUFFIX): m for name, m in named if isinstance(m, Packed)}
    tensors = replaced.named_buffers(remove_duplicate=False)
    return packed | {n: t for n, t in tensors if n.rpartition(".")[0].removesuffix(SUFFIX) not in packed}


def shelve(merged: fx.GraphModule, names: tuple[str, ...]) -> None:
    """Takes merged adapters out of parameters() and state_dict(), where the model's own names alone remain."""
    for name in names:
        tree = store_of(merged).adapters._modules.get(name)
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
            tensor = tensor_of(gm, f"{ADAPTERS}.{p.state_name(name)}")
            if spec.trainable and not isinstance(
                tensor, nn.Parameter
            ):  # .to() on a merged graph made a plain tensor of it
                tensor = nn.Parameter(tensor, requires_grad=tensor.requires_grad)
            put(gm, p, name, tensor)


def restored(merged: fx.GraphModule, state: State, *, move: bool = True) -> fx.GraphModule:
    """The module, not yet its graph, with replaced weights and merged adapters as they were before the merge.

    move: weights that waited elsewhere come to the graph's device. Raises MergeError if they were not kept.
    """
    shelf = shelved(merged)
    lines = state.merge_report  # of a packed weight they say what was replaced: it may be its bias alone
    missing = [name for r in lines for name in r.get("replaced", [r["target"]]) if name not in shelf]
    if missing:
        raise MergeError(
            f"{missing[0]}: the replaced weight was not kept (merge with keep_base=None or loaded from a file); "
            "derive from the unmerged graph, or merge with keep_base='device' or 'cpu'"
        )
    new = derive(merged, fx.Graph(), unmerged(state))
    back: dict[str, nn.Parameter | torch.Tensor] = {}  # first name of a tie -> the tensor that all its names get
    for name, kept in shelf.items():
        if isinstance(kept, Packed):
            set_packed(new, name, moved(kept, kept_of(new, name).device if move else kept.device))
            continue
        group = next((g for g in state.table.tied if name in g), (name,))
        untouched = next((n for n in group if n not in shelf and get_tensor(new, n) is not None), None)
        if kept.numel() == 0:  # the merge added this one
            owner, leaf = owner_of(new, name)
            del owner._parameters[leaf]
            continue
        if group[0] not in back:
            back[group[0]] = (
                as_it_was(kept, tensor_of(new, name), move) if untouched is None else tensor_of(new, untouched)
            )
        set_tensor(new, name, back[group[0]])
    store_of(new).replaced = nn.Module()
    unshelve(new, state.placed(state.merged))
    return new


def as_it_was(kept: torch.Tensor, now: torch.Tensor, move: bool) -> torch.Tensor:
    """A shelved tensor back as the kind of tensor that it was, and on the device of the one in its place."""
    kept = kept.to(now.device) if move else kept
    if isinstance(now, nn.Parameter) and not isinstance(kept, nn.Parameter):
        return nn.Parameter(kept, requires_grad=False)
    return kept
