"""`--format table`: the model, its targets, what was refused, what the passes did; with --target, the nodes around it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.markup import escape
from rich.text import Text

from ..tables import Cell, Table, drawn, printable
from ..verbs.explanation import tables, totals
from ..verbs.rows import Group, folded, unfolded
from .as_code import text, title
from .facts import Inspection
from .labels import labels_of
from .nodes import Node

HINT = 'choose among them with --recipe, e.g. --recipe \'{"peft_type": "LORA", "target_modules": ["%s"]}\''


def show(inspection: Inspection, console: Console, expand: bool) -> None:
    console.print()
    header(inspection, console)
    if inspection.view.target is not None:
        show_view(inspection, console)
        return
    groups = (unfolded if expand else folded)(inspection.rows)
    for table in tables(groups):
        draw(console, table)
    if inspection.steps:
        draw(console, steps(inspection))
    closing(inspection, console, groups)


def header(inspection: Inspection, console: Console) -> None:
    model = inspection.model
    facts = [f"{model.parameters:,} parameters", "/".join(model.dtypes)]
    if inspection.nodes is not None:
        before, after = inspection.nodes
        facts += [f"{before:,}" + (f" → {after:,}" if after != before else "") + " nodes", model.mode or ""]
    facts += [] if model.weights else ["shapes only"]
    paragraph(console, [Cell(model.name, "bold"), *map(Cell, facts)])
    console.print(f"  [dim]{escape(model.source)}[/]", soft_wrap=True)
    console.print()


def draw(console: Console, table: Table, indent: int = 2) -> None:
    """The table, fitted to the console, and an empty line. The numbers of layers folded into one stand out."""
    for line in drawn(table, console.width - indent):
        shown = Text(" " * indent).join([Text(), Text.assemble(*line)])
        shown.highlight_regex(r"\{[\d.,]+\}", "cyan")
        shown.rstrip()
        console.print(shown, soft_wrap=True)
    console.print()


def paragraph(console: Console, facts: Sequence[Cell]) -> None:
    """Facts in one line, or in several: no fact is broken."""
    line: list[Cell] = []
    for fact in facts:
        if line and sum(len(c.text) for c in line) + len(fact.text) + 7 > console.width:
            console.print(Text.assemble("  ", *line), soft_wrap=True)
            line = []
        line += [*([Cell("  ·  ", "dim")] if line else []), Cell(printable(fact.text), fact.style)]
    console.print(Text.assemble("  ", *line), soft_wrap=True)


def steps(inspection: Inspection) -> Table:
    rows = []
    for s in inspection.steps:
        count = f"{s.before:,}" if s.before == s.after else f"{s.before:,} → {s.after:,}"
        places, ms = f"{s.changed:,}" if s.changed else "", f"{1000 * s.seconds:,.0f}"
        rows.append((s.name, places, count, difference(s.difference), ms))
    return Table(("pass", "places", "operators", "difference", "ms"), rows, frozenset(("places", "ms")))


def difference(counts: dict[str, int], shown: int = 3) -> str:
    """The largest changes, by operator."""
    order = sorted(counts, key=lambda op: (-abs(counts[op]), op))
    text = "  ".join(f"{counts[op]:+,} {op.removesuffix('.default')}".replace("-", "−", 1) for op in order[:shown])
    return text + (f"  and {len(order) - shown} more" if len(order) > shown else "")


def closing(inspection: Inspection, console: Console, groups: Sequence[Group]) -> None:
    paragraph(console, totals(inspection.rows, inspection.model.parameters))
    linear = [g.name.rpartition(".")[2] for g in groups if g.row.kind == "linear"]
    if linear and not inspection.adapted:
        console.print(f"  [dim]{escape(HINT % linear[0])}[/]", soft_wrap=True)
    console.print()


# One target


def show_view(inspection: Inspection, console: Console) -> None:
    view = inspection.view
    console.print("  ", end="")
    title(console, view.target or "", view.matches)
    console.print()
    parts = [("before", view.before), ("after", view.after)] if view.changed else [("graph", view.after)]
    for name, nodes in parts:
        console.print(f"  [dim]{name}[/]")
        draw(console, node_table(nodes))


def node_table(nodes: Sequence[Node]) -> Table:
    labels, rows = labels_of(nodes), []
    for n in nodes:
        name = Cell(f"+ {labels[n.name]}", "green") if n.inserted else f"  {labels[n.name]}"
        what = n.target if n.op.startswith("call_") else n.op
        rows.append((name, what, ", ".join(inputs(n, labels)), n.type, n.tag.get("adapter", "")))
    return Table(("  node", "operator", "inputs", "value", "adapter"), rows)


def inputs(n: Node, labels: dict[str, str]) -> Iterator[str]:
    yield from (text(a, labels) for a in n.args)
    yield from (f"{k}={text(v, labels)}" for k, v in n.kwargs.items())
