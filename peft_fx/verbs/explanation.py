"""How rows of targets are shown, by `print(explain(graph))`, in a notebook and by `peft-fx inspect`: a table of what is adapted,
notes on what needs a word, and a line of totals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..methods import get_method
from ..passes.forms.lowering import forms_of
from ..tables import Cell, Shown, Table, counted
from ..target import sizes
from .rows import Group, Row, folded

STYLES = {"planned": "green", "active": "green", "merged": "cyan", "resident": "dim", "possible": "dim",
          "refused": "red", "unmatched": "yellow"}  # fmt: skip
LEFT_OUT = ("refused", "unmatched")  # of the table: what the notes are for
FORMS = {"weight": "weight form", "replay": "runs once more", "none": "not read"}


@dataclass(frozen=True, repr=False)
class Explanation(Shown):
    """Every target with its decision, one of `rows` each; printed, those of equal layers are one line."""

    rows: tuple[Row, ...]

    def parts(self) -> list[str | Table]:
        if not self.rows:
            return ["no adapters; explain(graph, recipe) shows what a recipe would do"]
        return [*tables(folded(self.rows)), " · ".join(cell.text for cell in totals(self.rows))]


def tables(groups: Sequence[Group]) -> list[Table]:
    """The table of targets, and the notes; what would be empty is left out."""
    listed, left_out = ([g for g in groups if (g.row.status in LEFT_OUT) is out] for out in (False, True))
    noted = left_out + [g for g in listed if noteworthy(g.row)]
    return [make(part) for make, part in ((targets, listed), (notes, noted)) if part]


def targets(groups: Sequence[Group]) -> Table:
    """One row per group; columns that say the same of every row, or nothing, are left out where they may be."""
    rows = [g.row for g in groups]
    adapted = any(r.adapter for r in rows)
    columns: dict[str, tuple[bool, Callable[[Group], str | Cell]]] = {
        "target": (True, lambda g: g.name),
        "×": (True, lambda g: str(g.count) if g.count > 1 else ""),
        "kind": (True, lambda g: g.row.kind),
        "shape": (True, lambda g: sizes(g.row.shape)),
        "storage": (any(r.storage != "dense" for r in rows), lambda g: g.row.storage),
        "adapter": (len({r.adapter for r in rows}) > 1, lambda g: g.row.adapter),
        "method": (adapted, lambda g: g.row.method),
        "lowering": (any(r.lowering for r in rows), lambda g: g.row.lowering),
        "parameters": (adapted, lambda g: f"{'' if g.row.status == 'merged' else '+'}{g.parameters:,}"),
        "read by": (not adapted and any(r.reason for r in rows), lambda g: operators(g.row)),
        "status": (adapted, lambda g: Cell(g.row.status, STYLES.get(g.row.status, ""))),
        "rounding": (any(g.rounding_error is not None for g in groups), lambda g: error(g.rounding_error)),
    }
    shown = {name: value for name, (wanted, value) in columns.items() if wanted}
    cells = [[value(g) for value in shown.values()] for g in groups]
    return Table(tuple(shown), cells, frozenset(("×", "parameters", "rounding")))


def error(rounding: float | None) -> str:
    return "" if rounding is None else f"≤ {rounding:.0e}" if rounding else "0"


def operators(row: Row) -> str:
    return "" if row.lowering == "weight" else row.reason.replace("aten::", "").replace("transformers::", "")


def noteworthy(row: Row) -> bool:
    """A target that its graph does not read, or that got the weight form though its method, if there is one, has another."""
    another = not row.method or forms_of(get_method(row.method))
    return row.lowering in ("none", "replay") or (row.lowering == "weight" and row.status != "merged" and bool(another))


def notes(groups: Sequence[Group]) -> Table:
    rows = []
    for g in groups:
        left_out = g.row.status in LEFT_OUT
        what = Cell(g.row.status, STYLES[g.row.status]) if left_out else Cell(FORMS[g.row.lowering], "dim")
        name = f"{g.name} × {g.count}" if g.count > 1 else g.name
        reason = one_line(g.row.reason)  # of an unmatched entry it begins with the entry
        rows.append((what, reason if g.row.status == "unmatched" else f"{name}: {reason}"))
    return Table((), rows)


def one_line(reason: str) -> str:
    return "; ".join(line.strip() for line in reason.splitlines() if line.strip())


def totals(rows: Sequence[Row], base: int = 0) -> list[Cell]:
    """Numbers of targets by what became of them, and of parameters. base: of the model, to give the share of those added."""
    if any(r.status == "possible" for r in rows):
        return [Cell(counted(len(rows), "possible target"), "bold")]
    count = {status: sum(r.status == status for r in rows) for status in STYLES}
    added = sum(r.parameters for r in rows if r.status != "merged")
    facts = [Cell(counted(len(rows) - sum(count[s] for s in LEFT_OUT), "target"), "bold")]
    facts += [Cell(f"{count[s]:,} {s}", STYLES[s]) for s in LEFT_OUT if count[s]]
    if added or not count["merged"]:
        share = f", {100 * added / (base + added):.2f} % of all" if base else ""
        facts.append(Cell(f"+{counted(added, 'parameter')}{share}"))
    return facts + [Cell(f"{count['merged']:,} merged", STYLES["merged"])] * bool(count["merged"])
