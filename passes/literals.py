"""Turn literals that capture froze into nodes that follow the module: training mode and device.

`MarkModes` compares the graph with a second capture of the same model in the other mode. Where the two differ in a literal
only (dropout's `train`, attention's dropout probability, batch norm's `training`) the literal becomes a node that yields the
value of the current mode; batch norm's counter, which only training has, counts by 1 or 0. Nothing is assumed about which
operators depend on the mode: whatever else differs locks the graph to the mode it was captured in, with the difference as
the reason.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from ..store import DEVICE
from .base import Pass
from .operators import full_args, schema_name
from .splice import mode_node, same_literals

aten = torch.ops.aten
# Calls that are the identity on the values, recorded or not depending on strides.
IDENTITIES = {"aten::contiguous", "aten::_assert_tensor_metadata"}


@dataclass(frozen=True)
class MarkModes(Pass):
    """other: the same model captured in eval mode; the graph itself is the training capture."""

    other: fx.Graph

    def call(self, gm):
        changes = difference(gm.graph, self.other)
        if isinstance(changes, str):
            lock(gm, changes)
            return 0
        for node, position, train_value, eval_value in changes:
            choice = mode_node(gm, train_value, eval_value)
            if isinstance(position, int):
                node.args = tuple(full_args(node))[:position] + (choice,) + tuple(full_args(node))[position + 1 :]
            else:
                node.update_kwarg(position, choice)
        return len(changes)


def lock(gm: fx.GraphModule, reason: str) -> None:
    """Makes leaving the captured mode an error."""
    gm.peft_fx.mode.locked = reason


def difference(train: fx.Graph, evaluation: fx.Graph) -> list[tuple[fx.Node, int | str, object, object]] | str:
    """Literals that differ, as (node, argument, train value, eval value), or why the graphs cannot be aligned."""
    left, right = [[n for n in g.nodes if not is_identity(n)] for g in (train, evaluation)]
    changes, value_of, i = [], {}, 0
    for a in left:
        b = right[i] if i < len(right) else None
        if b is None or not alike(a, b):
            if not is_counter(a):
                return f"{a.format_node()} has no counterpart in the eval graph (there: {b and b.format_node()})"
            changes.append((a, 1, 1, 0))
            continue
        i += 1
        value_of[b] = a
        if (found := literals(a, b, value_of)) is None:
            return f"{a.format_node()} takes other inputs in the eval graph: {b.format_node()}"
        changes += found
    if i < len(right):
        return f"the eval graph has {len(right) - i} more operations, first {right[i].format_node()}"
    return changes


def alike(a: fx.Node, b: fx.Node) -> bool:
    return a.op == b.op and (a.target == b.target or a.op in ("placeholder", "output"))


def is_counter(node: fx.Node) -> bool:
    """`num_batches_tracked.add_(1)`: in place on a buffer, result unused."""
    return (
        schema_name(node) == "aten::add_.Tensor"
        and isinstance(node.args[0], fx.Node)
        and node.args[0].op == "get_attr"
        and node.args[1] == 1
        and not node.users
    )


def literals(a: fx.Node, b: fx.Node, value_of: dict[fx.Node, fx.Node]):
    """The literal arguments in which two nodes differ; None if they differ in an input."""
    if a.op != "call_function" or not schema_name(a):
        same = str(fx.map_arg((a.args, a.kwargs), lambda n: skip(n).name)) == str(
            fx.map_arg((b.args, b.kwargs), lambda n: value_of.get(skip(n), n).name)
        )
        return [] if same or a.op in ("placeholder", "get_attr") else None
    left = {**dict(enumerate(full_args(a))), **a.kwargs}
    right = {**dict(enumerate(full_args(b))), **b.kwargs}
    changes = []
    for key in left:
        x, y = left[key], right.get(key)
        x = fx.map_arg(x, skip)
        y = fx.map_arg(y, lambda n: value_of.get(skip(n), n))
        if isinstance(x, (bool, int, float)) and isinstance(y, (bool, int, float)):
            if not same_literals((x,), (y,)):
                changes.append((a, key, x, y))
        elif x != y:
            return None
    return changes


def is_identity(node: fx.Node) -> bool:
    """True if the node's values are its input's: the names above, and casts to the dtype that the input has."""
    if schema_name(node) == "aten::to.dtype":
        return node.meta["val"].dtype == node.args[0].meta["val"].dtype
    return schema_name(node) in IDENTITIES


def skip(node: fx.Node) -> fx.Node:
    """The value behind identity calls."""
    while is_identity(node):
        node = node.args[0]
    return node


@dataclass(frozen=True)
class MarkDevice(Pass):
    """Replaces literals that name the model's device by a node that yields the device the module is on now."""

    device: torch.device

    def call(self, gm):
        node, changed = None, 0
        for n in list(gm.graph.nodes):
            if n.op != "call_function" or not (mentions(n.args, self.device) or mentions(n.kwargs, self.device)):
                continue
            if node is None:
                first = next(m for m in gm.graph.nodes if m.op not in ("placeholder", "get_attr"))
                with gm.graph.inserting_before(first):
                    node = gm.graph.call_module(DEVICE)
                node.meta["val"] = self.device
            n.args, n.kwargs = swap(n.args, self.device, node), swap(n.kwargs, self.device, node)
            changed += 1
        return changed


def mentions(value, device: torch.device) -> bool:
    if isinstance(value, (tuple, list)):
        return any(mentions(v, device) for v in value)
    if isinstance(value, dict):
        return any(mentions(v, device) for v in value.values())
    return isinstance(value, torch.device) and value == device


def swap(value, device: torch.device, node: fx.Node):
    if isinstance(value, (tuple, list)):
        return type(value)(swap(v, device, node) for v in value)
    if isinstance(value, dict):
        return {k: swap(v, device, node) for k, v in value.items()}
    return node if isinstance(value, torch.device) and value == device else value


@dataclass(frozen=True)
class BakeLiterals(Pass):
    """Undoes the above for export: every mode and device node becomes the value it has now."""

    def call(self, gm):
        nodes = [n for n in gm.graph.nodes if n.op == "call_module" and n.target.startswith("peft_fx.")]
        for node in nodes:
            value = gm.get_submodule(node.target)(*node.args)
            for user in list(node.users):
                user.args, user.kwargs = substitute(user.args, node, value), substitute(user.kwargs, node, value)
            gm.graph.erase_node(node)
        for node in [n for n in gm.graph.nodes if schema_name(n) == "aten::add_.Tensor" and n.args[1] == 0 and not n.users]:
            gm.graph.erase_node(node)
        return len(nodes)


def substitute(value, node: fx.Node, literal):
    return fx.map_arg(value, lambda n: literal if n is node else n)
