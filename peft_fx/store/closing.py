"""What runs of a graph with packed weights: an operator that reads a dequantized weight takes the packed numbers instead.

    linear(x, dequantize(tensors), b)  ->  packed_linear(x, tensors, b)      no dense copy waits for the backward
    embedding(dequantize(tensors), i)  ->  packed_embedding(i, tensors)      of the rows that are asked for alone

Graphs stay as they are on the left, so that a weight is dense to every pass; code is made from what is on the right.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import fx

aten, ours = torch.ops.aten, torch.ops.peft_fx


def packed_weights(graph: fx.Graph) -> list[fx.Node]:
    """The nodes that dequantize."""
    return list(graph.find_nodes(op="call_function", target=ours.dequantize.default))


def close(graph: fx.Graph) -> None:
    """Closes all readers of packed weights in `graph`."""
    for weight in packed_weights(graph):
        tensors, text = weight.args
        for reader, cast_ in readers(weight):
            x, b = arguments(reader)
            if reader.target is aten.linear.default:
                replace(graph, reader, ours.packed_linear.default, (x, tensors, b, text))
            elif not cast_:
                replace(graph, reader, ours.packed_embedding.default, (x, tensors, text))
        for node in [*weight.users, weight]:
            if not node.users and (node is weight or node.target is aten.to.dtype):
                graph.erase_node(node)


def readers(weight: fx.Node) -> list[tuple[fx.Node, bool]]:
    """(operator that can take the packed weight, whether behind a cast), for the casts to the input's own dtype."""
    found = []
    for user in weight.users:
        if takes(user, weight):
            found.append((user, False))
        elif user.target is aten.to.dtype and user.args[0] is weight:
            found += [(u, True) for u in user.users if u.target is aten.linear.default and takes(u, user)]
    return found


def takes(node: fx.Node, weight: fx.Node) -> bool:
    if node.target is aten.linear.default:
        return node.args[1] is weight and node.args[0] is not weight
    return node.target is aten.embedding.default and node.args[0] is weight and not options(node)


def options(embedding: fx.Node) -> bool:
    """Whether gradients of an embedding's weight are asked for in a way of their own, which packed ones have none of."""
    return any(embedding.args[3:]) or bool(embedding.kwargs)


def arguments(node: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """(x, bias) of a linear operator, (ids, None) of a look-up."""
    if node.target is aten.embedding.default:
        return cast(fx.Node, node.args[1]), None
    rest = node.args[2:]
    return cast(fx.Node, node.args[0]), cast("fx.Node | None", rest[0] if rest else node.kwargs.get("bias"))


def replace(graph: fx.Graph, reader: fx.Node, operator, args: tuple) -> None:
    with graph.inserting_before(reader):
        new = graph.call_function(operator, args)
    new.meta = reader.meta
    reader.replace_all_uses_with(new, propagate_meta=False)
    graph.erase_node(reader)
