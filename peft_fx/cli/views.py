"""Which nodes `--target` shows, as data: from the parameter to its operators, and what was inserted."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from ..errors import PeftFxError
from ..passes.inject.inject import tag_of
from ..passes.match.readers import parameter_nodes, sites
from ..planning.matching import matcher, nearest
from ..store.tensors import ADAPTERS
from ..target import ModuleTable
from .nodes import Node, Ref, View, Word


class TargetNotFound(PeftFxError, ValueError):
    """--target matches nothing."""


def view_of(base: fx.Graph, adapted: fx.Graph, pattern: str | None, rows: Iterable[str], table: ModuleTable) -> View:
    """The view of the first target that `pattern` matches, targets of `rows` first. Raises TargetNotFound."""
    if pattern is None:
        return View(before=as_data(base.nodes), after=as_data(adapted.nodes))
    read = parameter_nodes(base)
    every = [f"{r.path}.{p}" if r.path else p for r in table.records for p in r.parameters]
    every = [name for name in every if name in read]
    known = set(every)
    found = matching(pattern, [n for n in rows if n in known]) or matching(pattern, every)
    if not found:
        near = nearest(pattern, [n.rpartition(".")[0] for n in every])
        hint = f"; nearest: {', '.join(near)}" if near else ""
        raise TargetNotFound(f"--target {pattern!r} matches no parameter that the graph reads{hint}")
    before = around(read[found[0]])
    after = adapted_part(adapted, before, found[0])
    return View(found[0], len(found), as_data(n for n in base.nodes if n in before), as_data(after))


def matching(pattern: str, names: list[str]) -> list[str]:
    """Names that a suffix (whole components) or a regex means, as parameter or as module; weights before biases."""
    names = sorted(dict.fromkeys(names), key=lambda n: n.endswith("bias"))
    suffix = matcher("--target", [pattern])
    found = [n for n in names if suffix(n) or suffix(n.rpartition(".")[0])]
    if found:
        return found
    regex = matcher("--target", pattern)
    return [n for n in names if regex(n) or regex(n.rpartition(".")[0])]


def around(parameter: fx.Node) -> set[fx.Node]:
    """The parameter, the views of it, the operators that apply it (or whatever reads it), and their other parameters."""
    found, reason = sites(parameter)
    part = {parameter, *(n for s in found for n in (*s.chain, s.node))}
    return with_constants(part | set(parameter.users) if reason else part)


def adapted_part(graph: fx.Graph, before: set[fx.Node], target: str) -> list[fx.Node]:
    """The nodes of `before`, by name, and all that was inserted for the target."""
    names = {n.name for n in before}
    splices = {tag_of(n)["splice"] for n in graph.nodes if tag_of(n).get("target") == target and "splice" in tag_of(n)}
    part = {n for n in graph.nodes if n.name in names or tag_of(n).get("splice") in splices}
    part = with_constants(part)
    return [n for n in graph.nodes if n in part]


def with_constants(part: set[fx.Node]) -> set[fx.Node]:
    """Also the parameters, adapter tensors and mode switches that the nodes read."""
    return part | {i for n in part for i in n.all_input_nodes if i.op in ("get_attr", "call_module")}


def as_data(nodes: Iterable[fx.Node]) -> tuple[Node, ...]:
    return tuple(map(node_of, nodes))


def node_of(node: fx.Node) -> Node:
    value = node.meta.get("val")
    dtype, shape = (str(value.dtype), value.shape) if isinstance(value, torch.Tensor) else ("", ())
    tag = tag_of(node)
    return Node(
        name=node.name,
        op=node.op,
        target=str(node.target).removesuffix(".default") if node.op == "call_function" else str(node.target),
        args=tuple(map(plain, node.args)),
        kwargs={k: plain(v) for k, v in node.kwargs.items()},
        dtype=dtype.removeprefix("torch."),
        shape=tuple(s if isinstance(s, int) else str(s) for s in shape),
        tag=tag,
        inserted=bool(tag.get("role")) or (node.op == "get_attr" and str(node.target).startswith(f"{ADAPTERS}.")),
    )


def plain(value: Any) -> Any:
    """An argument as literals, lists, dicts and `Ref`s."""
    if isinstance(value, fx.Node):
        return Ref(value.name)
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    literal = isinstance(value, (bool, int, str, type(None))) or (isinstance(value, float) and math.isfinite(value))
    return value if literal else Word(value)  # JSON has no infinity
