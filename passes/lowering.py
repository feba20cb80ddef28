"""The two forms in which a method enters a graph, as pure functions ready to be traced.

    activation   y' = y + second(first(dropout(x), A) * s, B) + s * bias      at the operator, never the dense delta
    weight       W' = inv(weight(to(W), b, theta))                            at the parameter, any operator

`to` / `inv` bring a stored weight to canonical layout and back: transposed storage is swapped, and a grouped convolution
whose update crosses groups becomes the ungrouped one with zeros between the groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx
from torch.nn import functional as F

from ..config import AdapterConfig
from ..methods.base import Additive, Branch, InputMap, Method, OutputMap, Theta, block_diagonal
from ..target import Target
from .match import Site
from .operators import full_args


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


def weight_function(method: Method, target: Target, config: AdapterConfig, names: tuple[str, ...]):
    """(W, b or None, *theta) -> (W', b' or None), in W's dtype; computed in the wider of W's and theta's dtypes."""
    dense = method.dense_groups(target)

    def function(W, b, *tensors):
        theta = dict(zip(names, tensors, strict=True))
        wide = W.dtype
        for t in tensors:
            wide = torch.promote_types(wide, t.dtype) if t.is_floating_point() else wide
        new_W, new_b = apply_weight(method.training_weight, W, b, theta, target, config, wide, dense)
        return cast(new_W, W.dtype), (b if new_b is b else cast(new_b, W.dtype))

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
    """`x` in the widest of its own and the method's floating dtypes, as PEFT casts it: products take no mixed dtypes."""
    wide = x.dtype
    for t in tensors:
        wide = torch.promote_types(wide, t.dtype) if t.is_floating_point() else wide
    return cast(x, wide)


def activation_inputs(site: Site) -> list[fx.Node]:
    """Nodes other than x and the weight that the operator and its chain take: expert ids, offsets."""
    skip = {site.x, site.parameter, *site.chain}
    bias = site.operator.bias
    if bias is not None and bias < len(site.node.args):
        skip.add(site.node.args[bias])
    found: list[fx.Node] = []
    for node in (*site.chain, site.node):
        fx.map_arg((node.args, node.kwargs), lambda n: found.append(n) if n not in skip and n not in found else None)
    return found


def activation_signature(site: Site) -> tuple:
    """The static part of a site: operators and literals, with nodes replaced by their role."""
    roles = {site.x: "x", site.parameter: "W", **{n: f"c{i}" for i, n in enumerate(site.chain)}}
    roles |= {n: f"i{i}" for i, n in enumerate(activation_inputs(site))}

    def text(node):
        return str(fx.map_arg((tuple(full_args(node)), node.kwargs), lambda n: roles.get(n, "b")))

    return tuple((str(n.target), text(n)) for n in (*site.chain, site.node))


def branch_function(site: Site, method, target: Target, config: AdapterConfig, names: tuple[str, ...]):
    """(y, x, *theta, W where the method reads it) -> (y + dy,) for a method with `delta`."""
    dropout = method.input_dropout(target, config)

    def function(y, x, *tensors):
        theta = dict(zip((*names, "W") if method.reads_weight else names, tensors, strict=True))
        if method.reads_weight:
            theta["W"] = to_canonical(theta["W"], target)
        x = F.dropout(widened(x, tensors), dropout, True) if dropout else widened(x, tensors)
        return (y + cast(method.delta(x, theta, target, config), y.dtype),)

    return function


def input_map_function(site: Site, method, target: Target, config: AdapterConfig, names: tuple[str, ...]):
    """(x, *theta) -> (x',) for a method with `map_input`."""

    def function(x, *tensors):
        theta = dict(zip(names, tensors, strict=True))
        return (cast(method.map_input(widened(x, tensors), theta, target, config), x.dtype),)

    return function


def output_map_function(site: Site, method, target: Target, config: AdapterConfig, names: tuple[str, ...]):
    """(y, x, *theta) -> (y',); channels are the last axis for the method, whatever they are for the operator."""
    axis = site.operator.channels

    def function(y, x, *tensors):
        theta = dict(zip(names, tensors, strict=True))
        wide = widened(y, tensors)
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


def additive_function(site: Site, method: Method, target: Target, config: AdapterConfig, names: tuple[str, ...]):
    """(y, x, *theta, *inputs) -> (y',) for a method with `factors`.

    The factors are cast to y's dtype, not the activations to the factors': only the rank-r side is ever converted.
    """
    inputs = activation_inputs(site)
    operator, groups = site.operator, target.groups
    dropout = method.input_dropout(target, config)

    def function(y, x, *tensors):
        theta = dict(zip(names, tensors[: len(names)], strict=True))
        env = dict(zip(inputs, tensors[len(names) :], strict=True))

        def replay(x, weight, bias=None, groups=None):
            env[site.parameter] = weight
            for node in site.chain:
                env[node] = node.target(*fx.map_arg(node.args, env.__getitem__), **node.kwargs)
            args = full_args(site.node)
            last = site.chain[-1] if site.chain else site.parameter
            args = [x if a is site.x else env[last] if a is last else fx.map_arg(a, env.get) for a in args]
            if operator.bias is not None:
                args[operator.bias] = bias
            if operator.groups is not None:
                args[operator.groups] = 1
            return site.node.target(*args, **site.node.kwargs)

        f = method.factors(theta, target, config)
        A, B = aligned(cast(f.A, y.dtype), cast(f.B, y.dtype), operator.align)
        A = from_canonical(A, target)
        bias = None if f.bias is None else cast(f.bias * f.scale, y.dtype)
        if dropout:
            x = F.dropout(x, dropout, True)
        h = replay(x, A) * f.scale
        second = operator.second
        d = second(lambda h, B, bias: replay(h, from_canonical(B, target), bias), h, B, bias, groups)
        return (y + d,)

    return function


@dataclass(frozen=True)
class Form:
    """How a method shape enters at an operator.

    place: "output" functions take (y, x, *theta, ...) and give y'; "input" ones take (x, *theta) and give x'.
    kinds: operator kinds that have this form; None: all. build: makes the function. inputs: it takes the site's further
    inputs as well.
    """

    place: str
    kinds: frozenset[str] | None
    build: Callable
    inputs: bool = False


CHANNELED = frozenset({"linear", "embedding", "conv1d", "conv2d", "conv3d"})
FORMS = {
    Additive: Form("output", None, additive_function, inputs=True),
    Branch: Form("output", frozenset({"linear"}), branch_function),
    InputMap: Form("input", frozenset({"linear"}), input_map_function),
    OutputMap: Form("output", CHANNELED, output_map_function),
}


def form_of(method: Method) -> Form | None:
    """The activation form of a method's shape; None if it only has the weight form."""
    return next((form for shape, form in FORMS.items() if isinstance(method, shape)), None)
