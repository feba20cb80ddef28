"""`peft-fx methods --storage`: which method passes on which storage, and what PEFT has there.

The cells are outcomes of runs, which tools/storage_table.py made and wrote into storage_cells.json:

    steps, methods       in their order
    cells                scheme -> step -> "all", or {"passes": [method, ...], "refused": {reason: [method, ...]}}
    peft                 method -> "merge" | "forward" | "wrong" -> [scheme, ...]
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from ..errors import StorageError
from ..methods import unknown
from ..storage.schemes import SCHEMES
from ..tables import Table, wrapped
from .as_table import draw

FILE = Path(__file__).with_name("storage_cells.json")
PEFT_MARKS = {"merge": "m", "forward": "f", "wrong": "!"}
LEGEND = (
    "{ours} x: every step passes ({steps}); a number: all but what its note says. PEFT beside it: m: runs and merges, f: runs "
    "and does not merge, !: runs and is wrong, -: raises, or has no code for it."
)
WHAT = {
    "forward": "output of the dense weight",
    "gradient": "to x and the adapter",
    "merge dense": "one rounding",
    "unmerge": "bit for bit",
    "requantize": "merged and packed again",
    "hotswap": "in place",
    "compile": "torch.compile, fullgraph",
    "export": ".pt2 and back, packed",
    "face": "PeftModel",
}


@dataclass(frozen=True)
class Cells:
    """What the file holds."""

    steps: tuple[str, ...]
    methods: tuple[str, ...]
    cells: dict[str, dict]
    peft: dict[str, dict[str, list[str]]]

    def refusal(self, scheme: str, step: str, method: str) -> str:
        """Why a step is refused; "" where it passes."""
        cell = self.cells[scheme][step]
        if cell == "all" or method in cell["passes"]:
            return ""
        return next(reason for reason, methods in cell["refused"].items() if method in methods)

    def refusals(self, scheme: str, method: str) -> dict[str, str]:
        """Step -> reason, of those that do not pass."""
        found = {step: self.refusal(scheme, step, method) for step in self.steps}
        return {step: reason for step, reason in found.items() if reason}

    def pefts(self, scheme: str, method: str) -> str:
        """The mark of PEFT's pair."""
        own = self.peft.get(method, {})
        return next((mark for what, mark in PEFT_MARKS.items() if scheme in own.get(what, ())), "-")


@cache
def read() -> Cells:
    held = json.loads(FILE.read_text(encoding="utf-8"))
    return Cells(tuple(held["steps"]), tuple(held["methods"]), held["cells"], held["peft"])


def show(method: str | None, scheme: str | None, console: Console) -> None:
    """All methods on all storages; with one of either named, step by step. Raises RecipeError or StorageError."""
    known = read()
    if method is not None and method.upper() not in known.methods:
        raise unknown(method)
    if scheme is not None and scheme not in known.cells:
        raise StorageError(f"{scheme!r} is no storage: this version has {', '.join(SCHEMES)}")
    methods = known.methods if method is None else (method.upper(),)
    schemes = tuple(known.cells) if scheme is None else (scheme,)
    notes: dict[str, int] = {}
    console.print()
    whole = method is None and scheme is None
    draw(console, (matrix if whole else by_step)(known, methods, schemes, notes), indent=0)
    steps = ", ".join(f"{step}: {WHAT[step]}" for step in known.steps)
    for line in (LEGEND.format(ours="peft_fx", steps=steps), *(f"{n}  {text}" for text, n in notes.items())):
        for part in wrapped(line, console.width):
            console.print(f"[dim]{escape(part)}[/]", soft_wrap=True)


def matrix(known: Cells, methods: tuple[str, ...], schemes: tuple[str, ...], notes: dict[str, int]) -> Table:
    """A row for each method, a column for each scheme."""

    def cell(method: str, scheme: str) -> str:
        found = [noted(f"{step}: {reason}", notes) for step, reason in known.refusals(scheme, method).items()]
        return f"{','.join(found) or 'x'} {known.pefts(scheme, method)}"

    return Table(("method", *schemes), [[m, *(cell(m, s) for s in schemes)] for m in methods])


def by_step(known: Cells, methods: tuple[str, ...], schemes: tuple[str, ...], notes: dict[str, int]) -> Table:
    """A row for each pair, a column for each step."""

    def cell(method: str, scheme: str, step: str) -> str:
        reason = known.refusal(scheme, step, method)
        return noted(f"{step}: {reason}", notes) if reason else "x"

    rows = [[m, s, *(cell(m, s, step) for step in known.steps), known.pefts(s, m)] for m in methods for s in schemes]
    return Table(("method", "storage", *known.steps, "PEFT"), rows)


def noted(text: str, notes: dict[str, int]) -> str:
    """The number of a note, which is added if it is new."""
    return str(notes.setdefault(text, len(notes) + 1))
