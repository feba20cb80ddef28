"""The inputs that packed weights meet while batches go through a merged graph, one weight after the other.

All batches go through the graph together, node by node. Where an operator reads a packed weight that a merge changes, its
inputs are known in all batches: their XᵀX goes to whoever keeps the weight, and what is kept is what the batches go on with.
So each weight is folded once and no more than one XᵀX is there at a time; the weights behind see what those before have lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx
from torch.fx import _pytree as fx_pytree

from ..errors import GraphError
from ..passes.core.nodes import calling
from ..passes.match.readers import Site, parameter_nodes, sites
from ..store.lazy import graph_to_read
from ..store.tensors import packed_of
from ..target import Target

# name of a weight, XᵀX of its inputs if it is known -> the dense weight to go on with
Keep = Callable[[str, torch.Tensor | None], torch.Tensor]


def visit(gm: fx.GraphModule, targets: dict[str, Target], batches: Iterable[Any] | None, keep: Keep) -> None:
    """Calls `keep` for packed weights: first those whose inputs remain unknown, then the others as batches go through."""
    at = {} if batches is None else linear_sites(gm, targets.values())
    for name in targets:
        if name not in at:
            keep(name, None)
    if at:
        walk(gm, batches or (), at, keep)


def linear_sites(gm: fx.GraphModule, targets: Iterable[Target]) -> dict[str, Site]:
    """Name -> the linear operator that alone reads a packed weight; targets without one are left out."""
    nodes, found = parameter_nodes(graph_to_read(gm)), {}
    for target in targets:
        if target.kind == "linear" and target.name in nodes and packed_of(gm, target.name) is not None:
            at, reason = sites(nodes[target.name])
            if len(at) == 1 and not reason:
                found[target.name] = at[0]
    return found


@torch.no_grad()
def walk(gm: fx.GraphModule, batches: Iterable[Any], at: dict[str, Site], keep: Keep) -> None:
    """Sends batches through the graph in eval mode, and calls `keep` for the weights of these sites, in the graph's order.

    batches: of what the graph is called with, a dict of named inputs or a tuple of those in order; a tensor alone is the
    first. Raises GraphError for others, and for a graph that has no eval mode.
    """
    training = gm.training
    gm.eval()
    try:
        graph = graph_to_read(gm)
        runs = [Run(flat(graph, batch)) for batch in batches]
        if not runs:
            raise GraphError("activations has no batch: expected a list of what the graph is called with")
        lockstep(fx.Interpreter(gm, graph=graph), runs, {site.node: (name, site) for name, site in at.items()}, keep)
    finally:
        gm.train(training)


class Run:
    """One batch on its way: what it brought, and the values of nodes."""

    def __init__(self, inputs: list):
        self.inputs, self.values = iter(inputs), dict[fx.Node, Any]()


def lockstep(interpreter: fx.Interpreter, runs: list[Run], at: dict[fx.Node, tuple[str, Site]], keep: Keep) -> None:
    late = {node for _, site in at.values() for node in (site.parameter, *site.chain)}  # once the inputs are known
    last: tuple[fx.Node | None, torch.Tensor] = (None, torch.empty(0))
    for node in interpreter.graph.nodes:
        if node in late or node.op == "output":
            continue
        site = None
        if node in at:
            name, site = at[node]
            if last[0] is not site.x:  # one input goes to several weights, as a rule
                last = site.x, second_moment(run.values[site.x] for run in runs)
            weight = keep(name, last[1])
        for run in runs:
            interpreter.env, interpreter.args_iter = run.values, run.inputs
            if site is not None:
                run.values[site.parameter] = weight
                for view in site.chain:
                    run.values[view] = interpreter.run_node(view)
            run.values[node] = interpreter.run_node(node)
            for used in (
                *interpreter.user_to_last_uses.get(node, ()),
                *((site.parameter, *site.chain) if site else ()),
            ):
                run.values.pop(used, None)


def second_moment(inputs: Iterable[torch.Tensor]) -> torch.Tensor:
    """XᵀX (in, in) float32 of all rows of tensors (..., in)."""
    rows = (x.reshape(-1, x.shape[-1]).float() for x in inputs)
    first = next(rows)
    total = first.mT @ first
    for x in rows:
        total.addmm_(x.mT, x)
    return total


def flat(graph: fx.Graph, batch: Any) -> list:
    """A batch as the list of inputs that the graph takes."""
    info = calling(graph)
    positional, named = info.in_spec.children()
    names = list(info.orig_args)
    given = batch if isinstance(batch, (dict, tuple, list)) else (batch,)
    values = given if isinstance(given, dict) else dict(zip(names, given, strict=False))
    if set(values) != set(names) or len(given) > len(names):
        raise GraphError(
            f"a batch of activations has {', '.join(map(str, values))}; the graph takes {', '.join(names)}"
        )
    in_order = [values[name] for name in names]
    args, kwargs = in_order[: positional.num_children], dict(zip(names, in_order, strict=True))
    kwargs = {name: kwargs[name] for name in named.context or ()}
    return fx_pytree.tree_flatten_spec((args, kwargs), info.in_spec)
