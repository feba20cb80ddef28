"""The forms in which a method enters a graph, as pure functions ready to be traced.

    activation   x' = map_input(x), y' = y + delta(x), y' = map_output(y), or  at the operator, never the dense delta
                 y' = y + second(first(dropout(x), A) * s, B) + s * bias
    weight       W' = inv(weight(to(W), b, theta))                            at the parameter, any operator
    replay       y' = y + operator(dropout(x), W' - W, b' - b)                where the weight form would lose the dropout

`to` / `inv` bring a stored weight to canonical layout and back: transposed storage is swapped, and a grouped convolution
whose update crosses groups becomes the ungrouped one with zeros between the groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import fx
from torch.nn import functional as F

from ...config import AdapterConfig
from ...methods.base import Additive, Branch, InputMap, Method, OutputMap, Theta, block_diagonal
from ...storage.packed import Packed
from ...target import Target
from ..core.nodes import overload_of
from ..match.operators import full_args
from ..match.readers import Site


def to_canonical(W: torch.Tensor, target: Target, dense_groups: bool = False) -> torch.Tensor:
    """Stored weight -> canonical layout."""
    if target.transposed:
        W = W.mT
    if dense_groups and W.shape[1] != target.in_features:
        W = block_diagonal(W, target.groups)
    return W


def from_canonical(W: torch.Tensor, target: Target) -> torch.Tensor:
    """Canonical layout -> stored weight."""
    return W.mT if target.transposed else W


def weight_function(
    method: Method, target: Target, config: AdapterConfig, names: tuple[str, ...], weight: Callable | None = None
):
    """(W, b or None, *theta) -> (W', b' or None), in their own dtypes, a new b' in W's;
    computed in the wider of W's and theta's dtypes.

    weight: the function, if it is not `training_weight`.
    """
    dense, weight = method.dense_groups(target), weight or method.training_weight

    def function(W, b, *tensors):
        theta = dict(zip(names, tensors, strict=True))
        wide = W.dtype
        for t in tensors:
            wide = torch.promote_types(wide, t.dtype) if t.is_floating_point() else wide
        new_W, new_b = apply_weight(weight, W, b, theta, target, config, wide, dense)
        return cast(new_W, W.dtype), (b if new_b is b else cast(new_b, (W if b is None else b).dtype))

    return function


def requantized_function(method: Method, target: Target, config: AdapterConfig, names: tuple[str, ...], packed: Packed):
    """(W, b or None, *theta, *packed numbers) -> (W', b' or None): W' packed again, with the numbers and the one rounding of a
    merge."""
    own, text = tuple(packed.tensors), packed.text

    def function(W, b, *tensors):
        theta = dict(zip(names, tensors[: len(names)], strict=True))
        wide = torch.promote_types(W.dtype, torch.float32)
        new_W, new_b = apply_weight(method.weight, W, b, theta, target, config, wide, False)
        new_W = torch.ops.peft_fx.requantized(new_W, W, tensors[len(names) :], own, text)
        return new_W, (b if new_b is b else cast(new_b, W.dtype if b is None else b.dtype))

    return function


def apply_weight(
    weight: Callable, W, b, theta: Theta, target: Target, config: AdapterConfig, dtype: torch.dtype, dense: bool
):
    """A method's `weight` on a stored weight, all floating tensors in `dtype`; returns (stored W', b')."""
    theta = {k: cast(t, dtype) if t.is_floating_point() else t for k, t in theta.items()}
    canonical = cast(to_canonical(W, target, dense), dtype)
    wide_b = None if b is None else cast(b, dtype)
    new_W, new_b = weight(canonical, wide_b, theta, target, config)
    return from_canonical(new_W, target), (b if new_b is wide_b else new_b)


def cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`tensor.to(dtype)` without the node that a cast to the same dtype would leave in the graph."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def widened(x: torch.Tensor, tensors) -> torch.Tensor:
    """`x` in the widest of its own and the method's floating dtypes, as PEFT casts it: products take no mixed dtypes.

    Scales, numbers without dimensions, change no dtype: they are fp32 beside factors in half precision.
    """
    wide = x.dtype
    for t in tensors:
        wide = torch.promote_types(wide, t.dtype) if t.is_floating_point() and t.dim() else wide
    return cast(x, wide)


def activation_inputs(site: Site) -> list[fx.Node]:
    """Nodes other than x and the weight that the operator and its chain take: expert ids, offsets."""
    skip = {site.x, site.parameter, *site.chain}
    if (bias := bias_of(site)) is not None:
        skip.add(bias)
    found: list[fx.Node] = []
    for node in (*site.chain, site.node):
        fx.map_arg((node.args, node.kwargs), lambda n: found.append(n) if n not in skip and n not in found else None)
    return found


def bias_of(site: Site) -> fx.Node | None:
    """The operator's bias, where it takes one."""
    return None if site.operator.bias is None else full_args(site.node)[site.operator.bias]


def activation_signature(site: Site) -> tuple:
    """The static part of a site: operators and literals, with nodes replaced by their role."""
    roles = {site.x: "x", site.parameter: "W", **{n: f"c{i}" for i, n in enumerate(site.chain)}}
    roles |= {n: f"i{i}" for i, n in enumerate(activation_inputs(site))}

    def text(node):
        return str(fx.map_arg((tuple(full_args(node)), node.kwargs), lambda n: roles.get(n, "b")))

    return tuple((str(n.target), text(n)) for n in (*site.chain, site.node))


def replayed(
    site: Site, inputs: Sequence[torch.Tensor], x, weight, bias=None, groups: int | None = None
) -> torch.Tensor:
    """The operator at `site`, the views before it included, with other operands. inputs: of `activation_inputs`."""
    env = dict(zip(activation_inputs(site), inputs, strict=True)) | {site.parameter: weight}
    for node in site.chain:
        env[node] = overload_of(node)(*fx.map_arg(node.args, env.__getitem__), **node.kwargs)
    args = full_args(site.node)
    last = site.chain[-1] if site.chain else site.parameter
    args = [x if a is site.x else env[last] if a is last else fx.map_arg(a, env.get) for a in args]
    if site.operator.bias is not None:
        args[site.operator.bias] = bias
    if site.operator.groups is not None and groups is not None:
        args[site.operator.groups] = groups
    return overload_of(site.node)(*args, **site.node.kwargs)


# Functions at an operator: (y, x, W, b, *theta, *inputs) -> (y',), or (x, *theta) -> (x',) ahead of it.


def branch_function(site: Site, method, target: Target, config: AdapterConfig, names: tuple[str, ...]):
    """For a method with `delta`."""
    dropout = method.input_dropout(target, config)

    def function(y, x, W, b, *tensors):
        tensors = tensors[: len(names)]
        theta, x = dict(zip(names, tensors, strict=True)), widened(x, tensors)
        if dropout:
            x = F.dropout(x, dropout, True)
        if "W" in method.reads:
            theta["W"] = cast(to_canonical(W, target), x.dtype)
        if "y" in method.reads:
            if dropout and not method.undropped:
                theta["y"] = F.linear(x, cast(to_canonical(W, target), x.dtype))
            else:
                theta["y"] = cast(y, x.dtype) if b is None else cast(y, x.dtype) - cast(b, x.dtype)
        return (y + cast(method.delta(x, theta, target, config), y.dtype),)

    return function


def input_map_function(site: Site, method, target: Target, config: AdapterConfig, names: tuple[str, ...]):
    """For a method with `map_input`."""

    def function(x, *tensors):
        theta = dict(zip(names, tensors, strict=True))
        return (cast(method.map_input(widened(x, tensors), theta, target, config), x.dtype),)

    return function


def output_map_function(site: Site, method, target: Target, config: AdapterConfig, names: tuple[str, ...]):
    """For a method with `map_output`; channels are the last axis for it, whatever they are for the operator."""
    axis = site.operator.channels

    def function(y, x, W, b, *tensors):
        tensors = tensors[: len(names)]
        wide, theta = widened(y, tensors), dict(zip(names, tensors, strict=True))
        if axis == -1:
            return (cast(method.map_output(wide, theta, target, config), y.dtype),)
        moved = method.map_output(wide.movedim(axis, -1), theta, target, config)
        return (cast(moved, y.dtype).movedim(-1, axis),)

    return function


def aligned(A: torch.Tensor, B: torch.Tensor, align: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors (E, r, in), (E, out, r) with zeros appended to the rank, so that rows of either are `align` bytes' multiples."""
    if align == 1:
        return A, B
    missing = -A.shape[-2] * A.element_size() % align // A.element_size()
    return F.pad(A, (0, 0, 0, missing)).contiguous(), F.pad(B, (0, missing)).contiguous()


def additive_function(site: Site, method: Additive, target: Target, config: AdapterConfig, names: tuple[str, ...]):
    """For a method with `factors`.

    The factors are cast to y's dtype, not the activations to the factors': only the rank-r side is ever converted.
    """
    dropout = method.input_dropout(target, config)

    def function(y, x, W, b, *tensors):
        theta, inputs = dict(zip(names, tensors[: len(names)], strict=True)), tensors[len(names) :]
        if method.reads:
            theta["W"] = widened(to_canonical(W, target), tensors[: len(names)])
        f = method.factors(theta, target, config)
        A, B = aligned(cast(f.A, y.dtype), cast(f.B, y.dtype), site.operator.align)
        bias = None if f.bias is None else cast(f.bias * f.scale, y.dtype)
        if dropout:
            x = F.dropout(x, dropout, True)
        h = replayed(site, inputs, x, from_canonical(A, target), groups=1) * f.scale
        h = cast(method.between(h, site.operator.channels, theta, target, config), y.dtype)
        d = site.operator.second(
            lambda h, B, bias: replayed(site, inputs, h, from_canonical(B, target), bias, groups=1),
            h, B, bias, target.groups,
        )  # fmt: skip
        return (y + d,)

    return function


def replay_function(site: Site, method: Method, target: Target, config: AdapterConfig, names: tuple[str, ...]):
    """For a method that only has the weight form, with dropout on its input."""
    dropout, dense = method.input_dropout(target, config), method.dense_groups(target)
    changed = weight_function(method, target, config, names)
    undropped = method.undropped and weight_function(method, target, config, names, method.undropped)

    def function(y, x, W, b, *tensors):
        theta, inputs = tensors[: len(names)], tensors[len(names) :]

        def update(x, new, old):
            (new_W, new_b), (old_W, old_b) = new, old
            bias = None if new_b is old_b else new_b if old_b is None else new_b - old_b
            return replayed(site, inputs, x, new_W - old_W, bias, 1 if dense else None)

        old = from_canonical(to_canonical(W, target, dense), target), b
        if undropped:
            kept = undropped(W, b, *theta)
            y, old = y + update(x, kept, old), kept
        dropped = x if target.reads_ids else F.dropout(x, dropout, True)
        return (y + update(dropped, changed(W, b, *theta), old),)

    return function


def gated(function: Callable) -> Callable:
    """The function with a gate, 0-d, as last argument: 0 leaves its first operands as they are, 1 gives its results."""

    def function_with_gate(*tensors):
        *operands, gate = tensors
        results = function(*operands)
        return tuple(new if new is old else mixed(old, new, gate) for old, new in zip(operands, results, strict=False))

    return function_with_gate


def mixed(old: torch.Tensor | None, new: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """old + gate (new - old), exactly `new` where the gate is 1; None, a bias that the base lacks, is 0."""
    if old is None:
        return cast(new * gate, new.dtype)
    return torch.where(gate == 1, new, old + cast((new - old) * gate, old.dtype))


@dataclass(frozen=True)
class Form:
    """How a method shape enters at an operator.

    place: "output" functions take (y, x, W, b, *theta, *inputs) and give y'; "input" ones take (x, *theta) and give x'.
    kinds: operator kinds that have this form; None: all. build: makes the function.
    """

    place: str
    kinds: frozenset[str] | None
    build: Callable


CHANNELED = frozenset({"linear", "embedding", "conv1d", "conv2d", "conv3d"})
FORMS = {
    Additive: Form("output", None, additive_function),
    Branch: Form("output", frozenset({"linear"}), branch_function),
    InputMap: Form("input", frozenset({"linear"}), input_map_function),
    OutputMap: Form("output", CHANNELED, output_map_function),
}
REPLAY = Form("output", None, replay_function)


def forms_of(method: Method) -> tuple[Form, ...]:
    """The activation forms of a method's shapes, in the order in which they act; () if it only has the weight form."""
    return tuple(FORMS[shape] for shape in type(method).__mro__ if shape in FORMS)
