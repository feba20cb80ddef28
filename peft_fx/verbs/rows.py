"""What `explain` and `inspect` say of a target, and rows of repeated layers as one: `model.layers.{0..29}.self_attn.q_proj`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from ..folding import Path, components, gathered, joined
from ..target import Target


@dataclass(frozen=True)
class Row:
    """One target of one adapter. status: planned, active, resident, merged, refused, unmatched; possible: no adapter yet.

    reason: which operators read the target, why it got its lowering, or why it was refused. rounding_error: of a merge.
    """

    adapter: str
    target: str
    kind: str
    shape: tuple[int, ...]
    storage: str
    method: str
    lowering: str
    parameters: int
    status: str
    reason: str
    rounding_error: float | None = None


def possible_row(target: Target, lowering: str = "", reason: str = "") -> Row:
    """A target without adapter. lowering, reason: "" as long as there is no graph to ask."""
    return Row("", target.name, target.kind, target.shape, "dense", "", lowering, 0, "possible", reason)


@dataclass(frozen=True)
class Group:
    """Rows that differ in layer numbers alone. parameters: of all. rounding_error: the largest."""

    name: str
    row: Row
    count: int
    parameters: int
    rounding_error: float | None


def unfolded(rows: Iterable[Row]) -> list[Group]:
    return [Group(short(r.target), r, 1, r.parameters, r.rounding_error) for r in rows]


def folded(rows: Iterable[Row]) -> list[Group]:
    """Groups in the order of their first rows. Each stands for exactly the rows that its ranges multiply out to."""
    paths = ((alike(r), (r.target,) if r.status == "unmatched" else components(r.target), r) for r in rows)
    return [group(path, members) for path, members in gathered(paths)]


def alike(row: Row) -> tuple:
    """What rows must have in common: all but the layer number, and the error of each one's rounding."""
    same = replace(row, target="", rounding_error=None, reason="" if row.rounding_error is not None else row.reason)
    return (*vars(same).items(),)


def group(path: Path, rows: list[Row]) -> Group:
    errors = [r.rounding_error for r in rows if r.rounding_error is not None]
    return Group(short(joined(path)), rows[0], len(rows), sum(r.parameters for r in rows), max(errors, default=None))


def short(name: str) -> str:
    """A weight goes by its module's path, as in target_modules."""
    return name.removesuffix(".weight")
