"""Nodes by what they are in graphs of ours: to a type checker, an argument of one may be anything, and so may its target."""

from __future__ import annotations

from typing import cast

import torch
from torch import fx
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo


def input_of(node: fx.Node, position: int = 0) -> fx.Node:
    """The argument at `position`, which is a node."""
    return cast(fx.Node, node.args[position])


def name_of(node: fx.Node) -> str:
    """The target of a node that names one: an attribute, a module, a method or an input."""
    return cast(str, node.target)


def overload_of(node: fx.Node) -> torch._ops.OpOverload:
    """The ATen operator that a node calls."""
    return cast(torch._ops.OpOverload, node.target)


def results_of(graph: fx.Graph) -> tuple[fx.Node, ...]:
    """What the graph returns, one after the other."""
    return cast("tuple[fx.Node, ...]", tuple(cast(tuple, graph.output_node().args[0])))


def calling(graph: fx.Graph) -> _PyTreeInfo:
    """How a graph is called: names and structure of its inputs, structure of its outputs."""
    return cast(_PyTreeCodeGen, graph._codegen).pytree_info
