"""`--format dot`: Graphviz text; parameters are ovals, adapters are green, the view's own inputs have no frame."""

from __future__ import annotations

import json
from collections.abc import Iterable

from rich.console import Console

from .facts import Inspection
from .labels import labels_of
from .nodes import Node

STYLE = """\
  rankdir=TB; fontname="Helvetica"; fontsize=12; color="#b0b0b0"; fontcolor="#606060";
  node [fontname="Helvetica", fontsize=11, shape=box, style="rounded,filled", fillcolor="#f6f6f6", color="#909090"];
  edge [color="#909090", arrowsize=0.7];"""
ADAPTER = 'fillcolor="#d9f0dd", color="#3a8f4d"'
SHAPES = {"get_attr": "oval", "placeholder": "oval", "output": "oval"}


def show(inspection: Inspection, console: Console, expand: bool) -> None:
    view = inspection.view
    parts = {"before": view.before, "after": view.after} if view.changed and view.target else {"graph": view.after}
    body = [line for name, nodes in parts.items() for line in cluster(name, nodes)]
    title = quoted(view.target or inspection.model.name)
    print("\n".join([f"digraph {title} {{", STYLE, *body, "}"]), file=console.file)


def cluster(name: str, nodes: tuple[Node, ...]) -> Iterable[str]:
    """One sub-graph with nodes of its own: the same node stands before and after."""
    labels, known = labels_of(nodes), {n.name for n in nodes}
    yield f"  subgraph {quoted(f'cluster_{name}')} {{"
    yield f"    label={quoted(name)};"
    for outside in dict.fromkeys(i for n in nodes for i in n.inputs if i not in known):
        yield f'    {quoted(f"{name}/{outside}")} [label={quoted(outside)}, shape=plaintext, style=""];'
    for n in nodes:
        what = n.target if n.op.startswith("call_") else labels[n.name]
        text = "\n".join(filter(None, [what, n.type]))
        look = ", ".join(filter(None, [f"shape={SHAPES.get(n.op, 'box')}", ADAPTER if n.inserted else ""]))
        yield f"    {quoted(f'{name}/{n.name}')} [label={quoted(text)}, tooltip={quoted(n.target)}, {look}];"
        for i in n.inputs:
            yield f"    {quoted(f'{name}/{i}')} -> {quoted(f'{name}/{n.name}')};"
    yield "  }"


def quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
