"""Find where a target is used: its readers, and the operators behind them when they are recognised."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import fx

from ...storage.packed import SUFFIX, weight_name
from ...store.tensors import packed_of, tensor_of
from ..core.fakes import fake_mode_of, fake_of
from ..core.nodes import input_of, name_of
from .operators import OPERATORS, SWAPS, Operator, full_args, keeps_axes, schema_name

DEQUANTIZE = torch.ops.peft_fx.dequantize.default


@dataclass(frozen=True)
class Site:
    """One operator that applies a target's weight. chain: the views from the parameter to the operator, in order."""

    node: fx.Node
    operator: Operator
    weight_position: int
    parameter: fx.Node
    chain: tuple[fx.Node, ...]

    @property
    def x(self) -> fx.Node:
        position = self.operator.x if self.operator.x != self.weight_position else 1 - self.weight_position
        return input_of(self.node, position)

    @property
    def stored_transposed(self) -> bool:
        """True if the parameter as stored has out and in swapped, judged by the operator alone."""
        if self.operator.kind == "embedding":
            return True
        expects_in_out = self.operator.kind == "expert" and self.weight_position == 1
        swapped = sum(schema_name(n) in SWAPS for n in self.chain) % 2 == 1
        return expects_in_out != swapped


def tensor_nodes(graph: fx.Graph) -> dict[str, fx.Node]:
    """Name of a tensor -> the node that reads it."""
    return {name_of(n): n for n in graph.nodes if n.op == "get_attr"}


def parameter_nodes(graph: fx.Graph) -> dict[str, fx.Node]:
    """Name -> the node that gives the parameter's value: of a packed one, that which dequantizes it."""
    packed = {packed_name(n): n for n in graph.find_nodes(op="call_function", target=DEQUANTIZE)}
    return tensor_nodes(graph) | packed


def packed_name(node: fx.Node) -> str:
    """The weight that a node dequantizes."""
    return weight_name(name_of(cast("list[fx.Node]", node.args[0])[0]))


def add_reader(gm: fx.GraphModule, name: str) -> fx.Node:
    """A node for the value of the parameter called `name`, where the graph is being inserted to."""
    packed = packed_of(gm, name)
    if packed is None:
        node = gm.graph.get_attr(name)
        node.meta["val"] = fake_of(fake_mode_of(gm), tensor_of(gm, name))
        return node
    tensors = [add_reader(gm, f"{name}{SUFFIX}.{own}") for own in packed.tensors]
    node = gm.graph.call_function(DEQUANTIZE, (tensors, packed.text))
    with fake_mode_of(gm):
        node.meta["val"] = torch.empty(packed.shape, dtype=packed.dtype, device=packed.device)
    return node


def sites(parameter: fx.Node) -> tuple[list[Site], str]:
    """All operators that read a parameter, and "" or why its readers are not all recognised (the near-miss)."""
    found: list[Site] = []
    reason = ""

    def follow(node: fx.Node, previous: fx.Node, chain: tuple[fx.Node, ...]):
        nonlocal reason
        operator = OPERATORS.get(schema_name(node))
        if operator is not None and uses(node, previous) == 1:
            position = next((p for p in operator.weight if p < len(node.args) and node.args[p] is previous), None)
            if position is not None:
                found.append(Site(node, operator, position, parameter, chain))
                return
        if keeps_axes(node) and node.args[0] is previous and uses(node, previous) == 1:
            for user in node.users:
                follow(user, node, (*chain, node))
            return
        reason = (
            reason or f"the weight is read by {schema_name(node) or node.target}, for which there is no activation form"
        )

    for user in parameter.users:
        follow(user, parameter, ())
    return found, reason


def uses(node: fx.Node, of: fx.Node) -> int:
    """How often `of` occurs among the arguments of `node`."""
    count = 0

    def visit(n):
        nonlocal count
        count += n is of
        return n

    fx.map_arg((node.args, node.kwargs), visit)
    return count


def observed_kinds(graph: fx.Graph) -> dict[str, list]:
    """Parameter name -> [operator kind, transposed, groups], for parameters that recognised operators alone read."""
    kinds = {}
    for name, node in parameter_nodes(graph).items():
        found, reason = sites(node)
        variants = {(s.operator.kind, s.stored_transposed, groups_of(s)) for s in found}
        if not reason and len(variants) == 1:
            kinds[name] = list(variants.pop())
    return kinds


def groups_of(site: Site) -> int:
    return full_args(site.node)[site.operator.groups] if site.operator.groups is not None else 1


def describe(found: Iterable[Site], reason: str) -> str:
    """One line on how a target is read, for `explain`."""
    return (
        reason
        or ", ".join(sorted({schema_name(s.node) for s in found}))
        or "no operator of the graph reads this parameter"
    )
