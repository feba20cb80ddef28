"""`--format table`: the model, its targets, what was refused, what the passes did; with --target, the nodes around it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ..methods import get_method
from ..methods.base import Additive
from ..verbs.explain import Row
from .as_code import text, title
from .facts import Inspection
from .fold import Group, folded, unfolded
from .labels import labels_of
from .nodes import Node

COLOURS = {
    "planned": "green", "active": "green", "merged": "cyan", "resident": "dim", "possible": "dim", "refused": "red",
    "unmatched": "yellow",
}  # fmt: skip
FORMS = {"weight": "weight form", "replay": "runs once more", "none": "not read"}
FREE = ("target", "difference", "inputs", "value")  # columns that may wrap
HINT = 'choose among them with --recipe, e.g. --recipe \'{"peft_type": "LORA", "target_modules": ["%s"]}\''


def show(inspection: Inspection, console: Console, expand: bool) -> None:
    console.print()
    header(inspection, console)
    if inspection.view.target is not None:
        show_view(inspection, console)
        return
    groups = (unfolded if expand else folded)(inspection.rows)
    listed = [g for g in groups if g.row.status not in ("refused", "unmatched")]
    if listed:
        indent(console, targets(listed))
    notes(console, [g for g in groups if g not in listed] + [g for g in listed if noteworthy(g.row)])
    if inspection.steps:
        indent(console, steps(inspection))
    totals(inspection, console, listed)


def header(inspection: Inspection, console: Console) -> None:
    model = inspection.model
    nodes = f"{inspection.nodes[0]:,}" + (f" → {inspection.nodes[1]:,}" if len(set(inspection.nodes)) > 1 else "")
    facts = [f"{model.parameters:,} parameters", "/".join(model.dtypes), f"{nodes} nodes", model.mode]
    facts += [] if model.weights else ["shapes only"]
    console.print(f"  [bold]{escape(model.name)}[/]  [dim]·[/]  " + "  [dim]·[/]  ".join(facts))
    console.print(f"  [dim]{escape(model.source)}[/]", soft_wrap=True)
    console.print()


def plain_table(*columns: str, right: Sequence[str] = ()) -> Table:
    """Columns of fixed width but for those in FREE, headed by a thin rule."""
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    for name in columns:
        table.add_column(name, justify="right" if name in right else "left", overflow="fold", no_wrap=name not in FREE)
    return table


def indent(console: Console, table: Table) -> None:
    console.print(Padding(table, (0, 0, 1, 2), expand=False))


def targets(groups: list[Group]) -> Table:
    """One row per group; columns that say the same of every row, or nothing, are left out where they may be."""
    adapters = {g.row.adapter for g in groups}
    merged = any(g.rounding_error is not None for g in groups)
    adapted = adapters != {""}
    columns = {
        "target": lambda g: numbers_dimmed(g.name),
        "×": lambda g: str(g.count) if g.count > 1 else "",
        "kind": lambda g: g.row.kind,
        "shape": lambda g: "×".join(map(str, g.row.shape)),
        "storage": lambda g: g.row.storage,
        **({"adapter": lambda g: g.row.adapter} if len(adapters) > 1 else {}),
        **({"method": lambda g: g.row.method} if adapted else {}),
        "lowering": lambda g: g.row.lowering,
        **(
            {"parameters": lambda g: f"{'' if g.row.status == 'merged' else '+'}{g.parameters:,}"}
            if adapted
            else {"read by": lambda g: operators(g.row)}
        ),
        **({"status": lambda g: Text(g.row.status, COLOURS.get(g.row.status, ""))} if adapted else {}),
        **({"rounding": lambda g: error(g.rounding_error)} if merged else {}),
    }
    table = plain_table(*columns, right=("×", "parameters", "rounding"))
    for g in groups:
        table.add_row(*(value(g) for value in columns.values()))
    return table


def error(rounding: float | None) -> str:
    return "" if rounding is None else f"≤ {rounding:.0e}" if rounding else "0"


def operators(row) -> str:
    return "" if row.lowering == "weight" else row.reason.replace("aten::", "").replace("transformers::", "")


def numbers_dimmed(name: str) -> Text:
    shown = Text(name)
    shown.highlight_regex(r"\{[\d.,]+\}", "cyan")
    return shown


def noteworthy(row: Row) -> bool:
    """A target that its graph does not read, or an additive update that needs the weight form."""
    additive = not row.method or isinstance(get_method(row.method), Additive)
    return row.lowering == "none" or row.lowering == "replay" or (row.lowering == "weight" and additive)


def notes(console: Console, groups: list[Group]) -> None:
    """Reasons at full width."""
    table = Table.grid(padding=(0, 2, 0, 0))
    for g in groups:
        wrong = g.row.status in ("refused", "unmatched")
        what = Text(g.row.status, COLOURS[g.row.status]) if wrong else Text(FORMS[g.row.lowering], "dim")
        name = "" if g.row.status == "unmatched" else f"{g.name}  "
        table.add_row(what, Text.assemble(name, (one_line(g.row.reason), "dim")))
    if groups:
        indent(console, table)


def one_line(reason: str) -> str:
    return "; ".join(line.strip() for line in reason.splitlines() if line.strip())


def steps(inspection: Inspection) -> Table:
    table = plain_table("pass", "places", "operators", "difference", "ms", right=("places", "ms"))
    for s in inspection.steps:
        count = f"{s.before:,}" if s.before == s.after else f"{s.before:,} → {s.after:,}"
        table.add_row(
            s.name, f"{s.changed:,}" if s.changed else "", count, difference(s.difference), f"{1000 * s.seconds:,.0f}"
        )
    return table


def difference(counts: dict[str, int], shown: int = 3) -> str:
    """The largest changes, by operator."""
    order = sorted(counts, key=lambda op: (-abs(counts[op]), op))
    text = "  ".join(f"{counts[op]:+,} {op.removesuffix('.default')}".replace("-", "−", 1) for op in order[:shown])
    return text + (f"  and {len(order) - shown} more" if len(order) > shown else "")


def totals(inspection: Inspection, console: Console, listed: list[Group]) -> None:
    count = inspection.count
    if not inspection.adapted:
        console.print(f"  [bold]{len(inspection.rows):,} possible targets[/]")
        if names := [g.name.rpartition(".")[2] for g in listed if g.row.kind == "linear"]:
            console.print(f"  [dim]{escape(HINT % names[0])}[/]", soft_wrap=True)
        console.print()
        return
    base, added = inspection.model.parameters, inspection.added
    facts = [f"[bold]{len(inspection.rows) - count('refused', 'unmatched'):,} targets[/]"]
    facts += [f"[{COLOURS[s]}]{count(s):,} {s}[/]" for s in ("refused", "unmatched") if count(s)]
    if added or not count("merged"):
        facts.append(
            f"[bold]+{added:,} parameters[/], {100 * added / (base + added) if base + added else 0:.2f} % of all"
        )
    if count("merged"):
        facts.append(f"[cyan]{count('merged'):,} merged[/]")
    console.print("  " + "  [dim]·[/]  ".join(facts))
    console.print()


# One target


def show_view(inspection: Inspection, console: Console) -> None:
    view = inspection.view
    console.print("  ", end="")
    title(console, view.target, view.matches)
    console.print()
    parts = [("before", view.before), ("after", view.after)] if view.changed else [("graph", view.after)]
    for name, nodes in parts:
        console.print(f"  [dim]{name}[/]")
        indent(console, node_table(nodes))


def node_table(nodes: Sequence[Node]) -> Table:
    table = plain_table(" ", "node", "operator", "inputs", "value", "adapter")
    labels = labels_of(nodes)
    for n in nodes:
        mark, style = ("+", "green") if n.inserted else (" ", "")
        what = n.target if n.op.startswith("call_") else n.op
        cells = (what, ", ".join(inputs(n, labels)), n.type, n.tag.get("adapter", ""))
        table.add_row(Text(mark, style), Text(labels[n.name], style), *map(Text, cells))
    return table


def inputs(n: Node, labels: dict[str, str]) -> Iterator[str]:
    yield from (text(a, labels) for a in n.args)
    yield from (f"{k}={text(v, labels)}" for k, v in n.kwargs.items())
