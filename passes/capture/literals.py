"""Turn literals that capture froze into nodes that follow the module: training mode and device.

`MarkModes` compares the graph with a second capture of the same model in the other mode. Where the two differ in a literal
only (dropout's `train`, attention's dropout probability, batch norm's `training`) the literal becomes a node that yields the
value of the current mode; batch norm's counter, which only training has, counts by 1 or 0. Nothing is assumed about which
operators depend on the mode: whatever else differs locks the graph to the mode it was captured in, with the difference as
the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ...store.tensors import DEVICE, INPUTS, get_tensor, store_of
from ..core.base import Pass
from ..core.nodes import input_of, name_of
from ..core.regions import AUTOCAST, body_of, operands, put_literal, region_of, seen_inside
from ..core.splice import mode_node, same_literals
from ..match.operators import full_args, schema_name

# Calls that are the identity on the values, recorded or not depending on strides.
IDENTITIES = {"aten::contiguous", "aten::_assert_tensor_metadata"}


@dataclass(frozen=True)
class Change:
    """A literal that differs: argument `position` of `node`, which lies in the region that `calls` lead to."""

    node: fx.Node
    position: int | str
    train_value: object
    eval_value: object
    calls: tuple[fx.Node, ...] = ()


@dataclass(frozen=True)
class MarkModes(Pass):
    """other: the same model captured in eval mode; the graph itself is the training capture."""

    other: fx.GraphModule

    def call(self, gm):
        changes = difference(gm, self.other)
        if isinstance(changes, str):
            lock(gm, changes)
            return 0
        for c in changes:
            choice = seen_inside(gm, mode_node(gm, c.train_value, c.eval_value), c.calls)
            if isinstance(c.position, int):
                args = full_args(c.node)
                c.node.args = (*args[: c.position], choice, *args[c.position + 1 :])
            else:
                c.node.update_kwarg(c.position, choice)
        return len(changes)


def lock(gm: fx.GraphModule, reason: str) -> None:
    """Makes leaving the captured mode an error."""
    store_of(gm).mode.locked = reason


def difference(
    train: fx.GraphModule, evaluation: fx.GraphModule, calls: tuple[fx.Node, ...] = ()
) -> list[Change] | str:
    """The literals that differ, regions included, or why the graphs cannot be aligned. calls: where `train` is run."""
    left, right = [
        [n for n in g.graph.nodes if not is_identity(n) and not (calls and is_counted(n))] for g in (train, evaluation)
    ]
    changes: list[Change] = []
    value_of: dict[fx.Node, fx.Node] = {}
    i = 0
    for a in left:
        b = right[i] if i < len(right) else None
        if b is None or not alike(a, b):
            if not is_counter(a, inside=bool(calls)):
                return f"train mode runs {described(a)} where eval mode runs {b and described(b)}"
            changes.append(Change(a, 1, 1, 0, calls))
            continue
        i += 1
        value_of[b] = a
        if (found := literals(train, a, evaluation, b, value_of)) is None or not same_constant(train, evaluation, a, b):
            return f"{described(a)} takes other inputs in train mode than in eval mode"
        changes += [Change(a, position, x, y, calls) for position, x, y in found]
        if body := region_of(train, a):
            inner = difference(body, body_of(evaluation, b), (*calls, a))
            if isinstance(inner, str):
                return inner
            if inner and a.target is not AUTOCAST:
                return f"{described(inner[0].node)}, inside {a.target}, depends on the mode"
            changes += inner
    if i < len(right):
        return f"eval mode runs {len(right) - i} operations more, first {described(right[i])}"
    return changes


def described(node: fx.Node) -> str:
    """Operator and module path of a node, for messages."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    name = schema_name(node) or (name_of(node) if node.op == "get_attr" else node.name)
    return f"{name} in {stack[-1][0].split('@')[0] or 'the model itself'}" if stack else name


def same_constant(train: fx.GraphModule, evaluation: fx.GraphModule, a: fx.Node, b: fx.Node) -> bool:
    """False for two reads of tensors that are not the model's and differ in value: constants written in its code.

    On the meta device constants have no values to differ in.
    """
    if a.op != "get_attr":
        return True
    x, y = get_tensor(train, name_of(a)), get_tensor(evaluation, name_of(b))
    if x is y or x is None or y is None:
        return True
    described = [(t.shape, t.dtype, t.device) for t in (x, y)]
    return described[0] == described[1] and (x.is_meta or torch.equal(x, y))


def alike(a: fx.Node, b: fx.Node) -> bool:
    return a.op == b.op and (a.target == b.target or a.op in ("placeholder", "output"))


def is_counter(node: fx.Node, inside: bool) -> bool:
    """`num_batches_tracked.add_(1)`: in place on a buffer, result unused. inside: in a region, where it is an operand."""
    return (
        schema_name(node) == "aten::add_.Tensor"
        and (is_counted(input_of(node)) if inside else input_of(node).op == "get_attr")
        and node.args[1:2] == (1,)
        and not node.users
    )


def is_counted(node: fx.Node) -> bool:
    """A region's operand that is counted up and not read."""
    return (
        node.op == "placeholder"
        and bool(node.users)
        and all(schema_name(u) == "aten::add_.Tensor" and u.args == (node, 1) and not u.users for u in node.users)
    )


def arguments(gm: fx.GraphModule, call: fx.Node) -> tuple:
    """The arguments of a call that is no ATen operator's, without the buffers that its region only counts up."""
    if call.target is not AUTOCAST:
        return call.args
    start, given = operands(call)
    taken = zip(given, body_of(gm, call).graph.find_nodes(op="placeholder"), strict=True)
    return (*call.args[:start], *(o for o, p in taken if not (is_counted(p) and o.op == "get_attr")))


def literals(
    train: fx.GraphModule, a: fx.Node, evaluation: fx.GraphModule, b: fx.Node, value_of: dict[fx.Node, fx.Node]
) -> list[tuple[int | str, object, object]] | None:
    """Literal arguments in which two nodes differ, as (position, train value, eval value); None if they differ in an input."""
    if a.op != "call_function" or not schema_name(a):
        same = str(fx.map_arg((arguments(train, a), a.kwargs), lambda n: skip(n).name)) == str(
            fx.map_arg((arguments(evaluation, b), b.kwargs), lambda n: value_of.get(skip(n), n).name)
        )
        return [] if same or a.op in ("placeholder", "get_attr") else None
    left, right = ({**dict[int | str, Any](enumerate(full_args(n))), **n.kwargs} for n in (a, b))
    changes: list[tuple[int | str, object, object]] = []
    for key in left:
        x, y = left[key], right.get(key)
        x = fx.map_arg(x, skip)
        y = fx.map_arg(y, lambda n: value_of.get(skip(n), n))
        if isinstance(x, (bool, int, float, str)) and isinstance(y, (bool, int, float, str)):
            if not same_literals((x,), (y,)):
                changes.append((key, x, y))
        elif x != y:
            return None
    return changes


def is_identity(node: fx.Node) -> bool:
    """True if the node's values are its input's: the names above, and casts to the dtype that the input has."""
    if schema_name(node) == "aten::to.dtype":
        return node.meta["val"].dtype == input_of(node).meta["val"].dtype
    return schema_name(node) in IDENTITIES


def skip(node: fx.Node) -> fx.Node:
    """The value behind identity calls."""
    while is_identity(node):
        node = input_of(node)
    return node


@dataclass(frozen=True)
class MarkDevice(Pass):
    """Replaces literals that name the model's device by a node that yields the device the module is on now."""

    device: torch.device

    def call(self, gm):
        places = mentioning(gm, self.device)
        if places:
            first = next(m for m in gm.graph.nodes if m.op not in ("placeholder", "get_attr"))
            with gm.graph.inserting_before(first):
                node = gm.graph.call_module(DEVICE)
            node.meta["val"] = self.device
        for n, calls in places:
            inner = seen_inside(gm, node, calls)
            n.args, n.kwargs = swap(n.args, self.device, inner), swap(n.kwargs, self.device, inner)
        return len(places)


def mentioning(gm: fx.GraphModule, device: torch.device, calls: Sequence[fx.Node] = ()) -> list[tuple[fx.Node, tuple]]:
    """Calls with the device among their arguments, and the autocast calls whose regions hold them."""
    found = []
    for n in gm.graph.nodes:
        if n.op == "call_function" and (mentions(n.args, device) or mentions(n.kwargs, device)):
            found.append((n, tuple(calls)))
        if n.target is AUTOCAST:
            found += mentioning(body_of(gm, n), device, (*calls, n))
    return found


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
    """Undoes the above for export: every mode and device node becomes the value it has now; a program checks its own inputs."""

    def call(self, gm):
        nodes = [n for n in gm.graph.nodes if n.op == "call_module" and n.target.startswith("peft_fx.")]
        for node in nodes:
            value = None if node.target.startswith(INPUTS) else gm.get_submodule(node.target)(*node.args)
            for user in list(node.users):
                put_literal(gm, user, node, value)
            gm.graph.erase_node(node)
        for node in [
            n for n in gm.graph.nodes if schema_name(n) == "aten::add_.Tensor" and n.args[1] == 0 and not n.users
        ]:
            gm.graph.erase_node(node)
        return len(nodes)
