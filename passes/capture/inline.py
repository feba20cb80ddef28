"""Inline `wrap_with_set_grad_enabled` regions.

    h(*xs) under no_grad   ==   detach of every output of h(*xs)

Dynamo refuses these regions when they have free variables, and matchers would have to look inside them; every Llama has
one around its rotary embedding. `enable_grad` regions that are nested in nothing need no detach. Regions of other kinds
(`wrap_with_autocast`) change what the operators compute and stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import fx

from ...errors import GraphError
from ..core.base import Pass, regions
from ..core.nodes import name_of, results_of
from ..core.regions import AUTOCAST, body_of

GRAD_REGION = torch.ops.higher_order.wrap_with_set_grad_enabled
DETACH = torch.ops.aten.detach.default


@dataclass(frozen=True)
class InlineGradRegions(Pass):
    def call(self, gm):
        changed = 0
        while nodes := [n for n in gm.graph.nodes if n.target is GRAD_REGION]:
            for node in nodes:
                inline(gm, node)
            changed += len(nodes)
        for node in [n for n in gm.graph.nodes if n.target is AUTOCAST and is_empty(body_of(gm, n))]:
            erase_call(gm, node)  # what a nested region leaves behind
        return changed + sum(self.call(region) for region in regions(gm))

    def ensures(self, gm):
        if any(n.target is GRAD_REGION for n in gm.graph.nodes):
            raise GraphError("a set_grad_enabled region is left in the graph")


def inline(gm: fx.GraphModule, node: fx.Node) -> None:
    enabled, _, *operands = node.args
    body = body_of(gm, node)
    with gm.graph.inserting_before(node):
        placeholders = [n for n in body.graph.nodes if n.op == "placeholder"]
        env = dict(zip(placeholders, operands, strict=True))
        for inner in body.graph.nodes:
            if inner.op == "get_attr":
                name = adopt(gm, name_of(inner), getattr(body, name_of(inner)))
                env[inner] = gm.graph.get_attr(name)
                env[inner].meta = dict(inner.meta)
            elif inner.op not in ("placeholder", "output"):
                env[inner] = gm.graph.node_copy(inner, env.__getitem__)
        results = fx.map_arg(results_of(body.graph), env.__getitem__)
        if not enabled:
            results = fx.map_arg(results, lambda n: detach(gm, n))
    for user in list(node.users):  # getitem(region, i)
        user.replace_all_uses_with(results[cast(int, user.args[1])])
        gm.graph.erase_node(user)
    erase_call(gm, node)


def erase_call(gm: fx.GraphModule, node: fx.Node) -> None:
    """Removes a region's call, and the region if nothing else runs it."""
    regions_read = [n for n in node.all_input_nodes if n.op == "get_attr" and n.target in gm._modules]
    gm.graph.erase_node(node)
    for attribute in regions_read:
        if not attribute.users:
            gm.graph.erase_node(attribute)
            gm.delete_submodule(name_of(attribute))


def is_empty(region: fx.GraphModule) -> bool:
    return all(n.op in ("placeholder", "output") for n in region.graph.nodes)


def adopt(gm: fx.GraphModule, name: str, value) -> str:
    """Moves a region's own attribute (a nested sub-graph) to `gm` under a free name."""
    while hasattr(gm, name):
        name += "_"
    setattr(gm, name, value)
    return name


def detach(gm: fx.GraphModule, node: fx.Node) -> fx.Node:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return node
    new = gm.graph.call_function(DETACH, (node,))
    new.meta = {**node.meta, "val": value.detach()}
    return new
