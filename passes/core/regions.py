"""Regions: the sub-graphs that higher-order operators run, e.g. `wrap_with_autocast(..., body, *operands)`.

A region sees nothing but its operands, so a value of the graph outside comes in as one operand more:

    autocast(..., body, x)          body(x):        dropout(x, 0.1, True)
    autocast(..., body, x, mode)    body(x, mode):  dropout(x, 0.1, mode)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import fx

from .nodes import name_of

AUTOCAST = torch.ops.higher_order.wrap_with_autocast


def region_of(gm: fx.GraphModule, call: fx.Node) -> fx.GraphModule | None:
    """The sub-graph that `call` runs; None for ordinary nodes."""
    if call.op != "call_function":
        return None
    for argument in call.args:
        if isinstance(argument, fx.Node) and argument.op == "get_attr":
            found = gm._modules.get(name_of(argument))
            if isinstance(found, fx.GraphModule):
                return found
    return None


def body_of(gm: fx.GraphModule, call: fx.Node) -> fx.GraphModule:
    """The sub-graph of a call that has one."""
    return cast(fx.GraphModule, region_of(gm, call))


def operands(call: fx.Node) -> tuple[int, tuple]:
    """Where an autocast call's operands start, and the operands."""
    return 5, call.args[5:]


def seen_inside(gm: fx.GraphModule, value: fx.Node, calls: Sequence[fx.Node]) -> fx.Node:
    """`value`, a node of `gm`, as a node of the innermost region; calls: the autocast calls that lead there from `gm`."""
    for call in calls:
        gm = body_of(gm, call)
        value = operand(gm, call, value)
    return value


def operand(body: fx.GraphModule, call: fx.Node, value: fx.Node) -> fx.Node:
    """The placeholder of `body` through which it takes `value`; added if there is none."""
    placeholders = body.graph.find_nodes(op="placeholder")
    _, given = operands(call)
    if value in given:
        return placeholders[given.index(value)]
    call.args = (*call.args, value)
    first = next(n for n in body.graph.nodes if n.op != "placeholder")
    with body.graph.inserting_before(first):
        new = body.graph.placeholder(value.name)
    new.meta["val"] = value.meta["val"]
    return new


def put_literal(gm: fx.GraphModule, user: fx.Node, node: fx.Node, literal) -> None:
    """Replaces `node` by a literal in the arguments of `user`; an operand becomes a literal inside the region."""
    body = region_of(gm, user)
    if body is not None:
        start, given = operands(user)
        for inner in [p for p, o in zip(body.graph.find_nodes(op="placeholder"), given, strict=True) if o is node]:
            for reader in list(inner.users):
                put_literal(body, reader, inner, literal)
            body.graph.erase_node(inner)
        user.args = (*user.args[:start], *(o for o in given if o is not node))
    else:
        user.args, user.kwargs = fx.map_arg((user.args, user.kwargs), lambda n: literal if n is node else n)
