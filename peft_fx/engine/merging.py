"""The numbers of a merge, one target at a time.

W_merged = round(f_k(... f_1(float32(W)) ...))        one rounding, into the dtype of the weight
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import fx

from ..errors import MergeError
from ..methods.base import Additive, Method
from ..passes.forms.lowering import apply_weight, to_canonical
from ..planning.plan import Placement
from ..storage.packed import Packed
from ..store.state import State
from ..store.tensors import ADAPTERS, get_tensor, packed_of, tensor_of
from .derive import acting
from .storing import measured, packed_again


def acting_whole(tuned: fx.GraphModule, state: State) -> tuple[str, ...]:
    """The adapters that act. Raises MergeError where a gate lets only a part of one through."""
    if not state.gated:
        return state.acting
    weights = acting(tuned, state)
    if part := next((slot for slot, weight in weights.items() if weight != 1), None):
        raise MergeError(
            f"adapter {state.recipe[part].name!r} acts with weight {weights[part]}: switch it to 1 and merge then"
        )
    return tuple(name for name in state.active if name in weights)


def by_target(chosen: Iterable[Placement]) -> dict[str, list[Placement]]:
    """Parameter name -> its placements, in order; an adapter's own bias goes with the weight that may change it again."""
    groups: dict[str, list[Placement]] = {}
    for p in chosen:
        groups.setdefault(p.target.name, []).append(p)
    return groups


def folded(
    gm: fx.GraphModule,
    group: list[Placement],
    check_finite: bool,
    place: torch.Tensor | None = None,
    storage: str | None = "dense",
    H: torch.Tensor | None = None,
) -> tuple[dict[str, torch.Tensor | Packed], dict]:
    """What merging the placements of one target gives: tensor name -> result, and its line of the report.

    place: memory for the weight, where it keeps its shape. storage: of `STORAGES`, how a packed weight that changes is kept,
    None: not at all; H (in, in): XᵀX of its inputs. A packed weight that does not change is no result.
    """
    target = group[0].target
    packed = packed_of(gm, target.name)
    W = tensor_of(gm, target.name) if packed is None else packed.dense()
    b = get_tensor(gm, target.bias_name) if target.has_bias else None
    wide = torch.promote_types(W.dtype, torch.float32) if W.is_floating_point() else W.dtype
    with torch.no_grad():
        exact_W, old_b = W.detach(), None if b is None else b.detach()
        exact_b = old_b
        operands = {t.untyped_storage()._cdata for t in (W, b) if t is not None}
        for p in group:
            method, theta = p.rule, theta_of(gm, p)
            operands |= {t.untyped_storage()._cdata for t in theta.values()}
            dense = method.dense_groups(p.target)
            weight: Callable = method.weight
            last = p is group[-1] and wide == W.dtype and not dense and exact_W.shape == W.shape
            if last and writes_in_place(method) and packed is None:
                place = torch.empty_like(W, memory_format=torch.contiguous_format) if place is None else place
                weight = partial(weight, out=to_canonical(place, p.target))
            exact_W, exact_b = apply_weight(weight, exact_W, exact_b, theta, p.target, p.config, wide, dense)
        results: dict[str, torch.Tensor | Packed] = {}
        if packed is None or (storage == "dense" and not unchanged(exact_W, W)):
            results[target.name] = rounded(exact_W, W.dtype, operands, place)
        elif storage is not None and not unchanged(exact_W, W):
            results[target.name] = packed_again(packed, exact_W, target, storage, H)
        if exact_b is not None and exact_b is not old_b:
            results[target.bias_name] = rounded(exact_b, W.dtype if b is None else b.dtype, operands)
        for name, result in results.items():
            if check_finite and not finite(exact_W if isinstance(result, Packed) else result):
                merged = ", ".join(p.adapter for p in group)
                raise MergeError(f"{name}: merging {merged} gives inf or nan in {result.dtype}; nothing was merged")
        now = results.get(target.name, W)
        line: dict[str, Any] = {"target": target.name, "adapters": [p.adapter for p in group], "dtype": str(W.dtype)}
        line["rounding_error"] = rounding_error(now, exact_W)
        if packed is not None:
            line |= {"storage": storage, "replaced": [*results], **measured(now, exact_W, W, target, H)}
    return results, line


def unchanged(exact: torch.Tensor, W: torch.Tensor) -> bool:
    return exact.shape == W.shape and torch.equal(exact, W.to(exact.dtype))


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


def rounding_error(result: torch.Tensor | Packed, exact: torch.Tensor) -> float:
    """Greatest difference that rounding to the weight's dtype, or to its packed numbers, made."""
    if isinstance(result, Packed):
        result = result.dense()
    elif result.dtype == exact.dtype:
        return 0.0
    return float((result.to(exact.dtype) - exact).abs().max()) if result.numel() else 0.0


def theta_of(gm: fx.GraphModule, p: Placement) -> dict[str, torch.Tensor]:
    """A placement's tensors by name."""
    theta = {}
    for name in p.tensors:
        shared = p.resolve(name)
        tensor = tensor_of(gm, f"{ADAPTERS}.{shared.name}").detach()
        theta[name] = tensor.t() if shared.transposed else tensor
    return theta
