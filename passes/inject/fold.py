"""After a merge has stored its results under the targets' names: what their operators must change to read them.

A folded weight usually has the shape of the one it replaces and nothing is to be done. Two cases differ: a bias that the
base operator did not have, and a grouped convolution whose update crosses groups and is ungrouped now.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from ...errors import GraphError
from ...planning.plan import Placement
from ...store.lazy import graph_to_read
from ...store.tensors import get_tensor, packed_of, tensor_of
from ..core.base import Pass
from ..core.fakes import fake_mode_of, fake_of
from ..match.readers import add_reader, parameter_nodes, sites, tensor_nodes
from .inject import add_bias, drop_groups


@dataclass(frozen=True)
class PointAtFolded(Pass):
    placements: tuple[Placement, ...]

    def idle(self, gm):
        nodes = parameter_nodes(graph_to_read(gm))
        return all(fits(nodes.get(p.target.name), p, gm) for p in self.placements)

    def call(self, gm):
        nodes, fake_mode, changed = parameter_nodes(gm.graph), fake_mode_of(gm), 0
        for p in self.placements:
            node, target = nodes.get(p.target.name), p.target
            if node is None:
                continue
            if node.op != "get_attr" and packed_of(gm, target.name) is None:
                node = dense_in_place_of(gm, node, target.name)
                changed += 1
            found, _ = sites(node)
            if node.op == "get_attr":
                node.meta["val"] = fake_of(fake_mode, tensor_of(gm, target.name))
            if p.rule.dense_groups(target):
                drop_groups(found)
                changed += 1
            if not target.has_bias and target.bias and get_tensor(gm, target.bias_name) is not None:
                with gm.graph.inserting_after(node):
                    bias = gm.graph.get_attr(target.bias_name)
                bias.meta["val"] = fake_of(fake_mode, tensor_of(gm, target.bias_name))
                add_bias(found, bias)
                changed += 1
        return changed

    def ensures(self, gm):
        for name in tensor_nodes(gm.graph):
            if not isinstance(get_tensor(gm, name), torch.Tensor) and not hasattr(gm, name):
                raise GraphError(f"the graph reads {name}, which the module does not have")


def dense_in_place_of(gm: fx.GraphModule, dequantized: fx.Node, name: str) -> fx.Node:
    """The node that reads a weight which was packed and is dense now."""
    tensors = dequantized.all_input_nodes
    with gm.graph.inserting_before(dequantized):
        node = add_reader(gm, name)
    node.meta = {**dequantized.meta, **node.meta}
    dequantized.replace_all_uses_with(node, propagate_meta=False)
    gm.graph.erase_node(dequantized)
    for tensor in tensors:
        if not tensor.users:
            gm.graph.erase_node(tensor)
    return node


def fits(node: fx.Node | None, p: Placement, gm: fx.GraphModule) -> bool:
    """Whether a folded weight is read as the one before it."""
    if node is None:
        return True
    target = p.target
    new_bias = not target.has_bias and target.bias and get_tensor(gm, target.bias_name) is not None
    if node.op != "get_attr":  # it was packed
        return not new_bias and packed_of(gm, target.name) is not None
    now = tensor_of(gm, target.name)
    return not new_bias and not p.rule.dense_groups(target) and looks(now) == looks(node.meta["val"])


def looks(tensor: torch.Tensor) -> tuple:
    """What a node's value says of a tensor, but for the device: all values of a graph keep that of the capture."""
    return tensor.shape, tensor.stride(), tensor.dtype
