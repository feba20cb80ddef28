"""`--format json`: one object on stdout; keys are only ever added."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from typing import Any

from rich.console import Console

from .facts import Inspection
from .nodes import Node, Ref

FORMAT = 1


def show(inspection: Inspection, console: Console, expand: bool) -> None:
    """Targets are never grouped."""
    print(json.dumps(document(inspection), indent=2), file=console.file)


def document(inspection: Inspection) -> dict:
    view = inspection.view
    before, after = inspection.nodes or (None, None)
    return {
        "format": FORMAT,
        "model": asdict(inspection.model),
        "targets": [asdict(row) for row in inspection.rows],
        "passes": [asdict(step) for step in inspection.steps],
        "totals": {
            "targets": len(inspection.rows) - inspection.count("refused", "unmatched"),
            "refused": inspection.count("refused"),
            "unmatched": inspection.count("unmatched"),
            "parameters_added": inspection.added,
            "nodes_before": before,
            "nodes_after": after,
        },
        "target": None if view.target is None else {
            "name": view.target,
            "matches": view.matches,
            "before": [node(n) for n in view.before],
            "after": [node(n) for n in view.after],
        },
    }  # fmt: skip


def node(n: Node) -> dict:
    return {f.name: with_names(getattr(n, f.name)) for f in fields(n)}


def with_names(value: Any) -> Any:
    """References to nodes as "%name"."""
    if isinstance(value, Ref):
        return f"%{value.name}"
    if isinstance(value, dict):
        return {k: with_names(v) for k, v in value.items()}
    return [with_names(v) for v in value] if isinstance(value, (list, tuple)) else value
