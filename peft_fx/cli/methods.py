"""`peft-fx methods`: what the methods can do, as a table; or one of them, with its formulas, fields and file keys."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from rich.console import Console
from rich.markup import escape

from ..methods import unknown
from ..planning.plan import ROOT_KEY
from ..tables import Table, wrapped
from ..target import sizes
from .as_table import draw
from .method_facts import SIZE, Facts, facts, names

MARKS = {"activation": "x", "weight": "W", "": ""}
LEGEND = (
    "x: acts on activations; W: rewrites the weight in the forward; empty: refused. swap: in place, adapters of the same "
    "shape or of any rank up to the slot's; +: also adapters that leave out some targets. start: = where a fresh adapter "
    "changes nothing. conv: in 1, 2 and 3 dimensions, a mark each where they differ. shared: tensors that all targets share. "
    f"trained: elements on {SIZE}x{SIZE} with default options. Whatever has a merge has an unmerge that changes no bit."
)
# what fits into 80 columns: convolutions of 1, 2 and 3 dimensions in one column
GROUPS = {
    "linear": ("linear",), "conv": ("conv1d", "conv2d", "conv3d"), "embed": ("embedding",), "norm": ("norm",),
    "expert": ("expert",),
}  # fmt: skip


def marks(f: Facts, kinds: tuple[str, ...]) -> str:
    """One mark for kinds that are treated alike, else one each."""
    found = [MARKS[f.kinds[kind]] for kind in kinds]
    return found[0] if len(set(found)) == 1 else "".join(mark or "-" for mark in found)


COLUMNS: dict[str, Callable[[Facts], str]] = {
    "method": lambda f: f.name,
    **{group: partial(marks, kinds=kinds) for group, kinds in GROUPS.items()},
    "merge": lambda f: "yes" if f.merge else "no",
    "swap": lambda f: ("any" if f.ranks else "same") + ("+" if f.neutral else ""),
    "start": lambda f: {True: "=", False: "≠", None: "?"}[f.identity],
    "shared": lambda f: "x" if f.shared else "",
    "trained": lambda f: f"{f.parameters:,}",
}


def show(name: str | None, console: Console) -> None:
    """All methods, or one. Raises RecipeError for a name that is none."""
    if name is not None:
        if name.upper() not in names():
            raise unknown(name)
        return show_one(facts(name.upper()), console)
    console.print()
    rows = [[value(f) for value in COLUMNS.values()] for f in map(facts, names())]
    draw(console, Table(tuple(COLUMNS), rows, frozenset({"trained"})), indent=0)
    for line in wrapped(LEGEND, console.width):
        console.print(f"[dim]{escape(line)}[/]", soft_wrap=True)


def show_one(f: Facts, console: Console) -> None:
    console.print(f"\n{escape(f.text)}\n", soft_wrap=True)
    taken = "  ".join(f"{kind}: {form}" for kind, form in f.kinds.items() if form)
    console.print(f"[dim]shape[/]   {f.shape}\n[dim]kinds[/]   {taken}", soft_wrap=True)
    for kind, reason in f.refused.items():
        console.print(f"[dim]refused[/] {kind}: {escape(reason)}", soft_wrap=True)
    console.print(f"\n[dim]fields of its config[/] ({type(f.config).__name__}), besides those that all share")
    for field, (default, reason) in f.fields.items():
        console.print(
            f"  {field} = {escape(repr(default))}" + (f"  [dim]{escape(reason)}[/]" if reason else ""), soft_wrap=True
        )
    console.print(f"\n[dim]tensors[/] on a layer of {SIZE}x{SIZE}")
    for tensor, spec in f.tensors.items():
        role = "trained" if spec.trainable else "fixed"
        saved = f"file key {spec.key.removeprefix(ROOT_KEY)}" if spec.key else "not in files"
        pieces = f", in {spec.pieces.count} pieces" if spec.pieces else ""
        console.print(f"  {tensor} {escape(sizes(spec.shape))}  [dim]{role}, {saved}{pieces}[/]")
