"""Bring matrix products with a parameter to `aten.linear`, the one operator that matchers know for them.

    addmm(b, view(x, [-1, k]), W)  ->  linear(x, t(W), b)       transformers' Conv1D; the views around it go
    addmm(b, x, W), mm(x, W)       ->  linear(x, t(W), b)
    matmul(x, W)                   ->  linear(x, t(W))          x of 2 or more dimensions, W two-dimensional
    ... and with W = t(V) -> linear(x, V)

Values do not change by a bit: ATen's linear calls the same addmm / mm on the same operands.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx, nn

from ...store.tensors import get_tensor
from ..core.base import Pass
from ..core.nodes import input_of, name_of
from ..match.operators import SWAPS, schema_name

aten = torch.ops.aten
PRODUCTS = {"aten::mm": (0, 1, None), "aten::matmul": (0, 1, None), "aten::addmm": (1, 2, 0)}  # x, W, bias


@dataclass(frozen=True)
class Linearise(Pass):
    def call(self, gm):
        nodes = [n for n in gm.graph.nodes if schema_name(n) in PRODUCTS and rewrite(gm, n)]
        if nodes:
            gm.graph.eliminate_dead_code(is_impure_node=lambda n: schema_name(n) not in {*SWAPS, "aten::view"})
        return len(nodes)


def rewrite(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Rewrites one product if its second operand is a two-dimensional parameter, seen through transpositions at most."""
    x, W, bias = (None if i is None else node.args[i] for i in PRODUCTS[schema_name(node)])
    if not (isinstance(x, fx.Node) and isinstance(W, fx.Node) and is_parameter(gm, W)):
        return False
    if x.meta["val"].dim() < 2 or W.meta["val"].dim() != 2 or set(node.kwargs.values()) - {1}:
        return False
    outer = {}
    if (
        schema_name(x) == "aten::view"
        and input_of(x).meta["val"].dim() > 2
        and all(schema_name(u) == "aten::view" for u in node.users)
    ):
        full = input_of(x).meta["val"].shape
        if full[-1] == x.meta["val"].shape[-1] and all(
            str(u.meta["val"].shape[:-1]) == str(full[:-1]) and u.meta["val"].dim() == len(full) for u in node.users
        ):
            outer, x = dict(node.users), input_of(x)
    with gm.graph.inserting_before(node):
        if schema_name(W) == "aten::t":
            V = input_of(W)
        else:
            V = gm.graph.call_function(aten.t.default, (W,))
            V.meta = {**node.meta, "val": W.meta["val"].t()}
        args = (x, V) if bias is None else (x, V, bias)
        new = gm.graph.call_function(aten.linear.default, args)
    shape_source = next(iter(outer), node)
    new.meta = {**node.meta, "val": shape_source.meta["val"]}
    for view in outer:
        view.replace_all_uses_with(new)
        gm.graph.erase_node(view)
    node.replace_all_uses_with(new)
    gm.graph.erase_node(node)
    return True


def is_parameter(gm: fx.GraphModule, node: fx.Node) -> bool:
    while schema_name(node) in SWAPS:
        node = input_of(node)
    return node.op == "get_attr" and isinstance(get_tensor(gm, name_of(node)), nn.Parameter)
