"""What `explain` and `inspect` say of a target, and rows of repeated layers as one: `model.layers.{0..29}.self_attn.q_proj`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

Path = tuple[str | tuple[int, ...], ...]  # components; a number, or the numbers that were folded, as a tuple


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
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        path = components(row.target) if row.status != "unmatched" else (row.target,)
        groups.setdefault((alike(row), path), []).append(row)
    depth = max((len(path) for _, path in groups), default=0)
    for position in reversed(range(depth)):
        groups = merged(groups, position)
    return [group(path, members) for (_, path), members in groups.items()]


def alike(row: Row) -> tuple:
    """What rows must have in common: all but the layer number, and the error of each one's rounding."""
    same = replace(row, target="", rounding_error=None, reason="" if row.rounding_error is not None else row.reason)
    return (*vars(same).items(),)


def merged(groups: dict[tuple, list[Row]], position: int) -> dict[tuple, list[Row]]:
    """Folds one component: groups that are equal everywhere else become one."""
    result: dict[tuple, tuple[set[int], list[Row]]] = {}
    for (key, path), members in groups.items():
        numbers = path[position] if position < len(path) else None
        rest = (key, path[:position], path[position + 1 :]) if isinstance(numbers, tuple) else (key, path, None)
        values, rows = result.setdefault(rest, (set(), []))
        values.update(numbers if isinstance(numbers, tuple) else ())
        rows += members
    return {
        (key, head if tail is None else (*head, tuple(sorted(values)), *tail)): rows
        for (key, head, tail), (values, rows) in result.items()
    }


def components(name: str) -> Path:
    return tuple((int(part),) if part.isdigit() else part for part in name.split("."))


def group(path: Path, rows: list[Row]) -> Group:
    name = ".".join(part if isinstance(part, str) else ranges(part) for part in path)
    errors = [r.rounding_error for r in rows if r.rounding_error is not None]
    return Group(short(name), rows[0], len(rows), sum(r.parameters for r in rows), max(errors, default=None))


def short(name: str) -> str:
    """A weight goes by its module's path, as in target_modules."""
    return name.removesuffix(".weight")


def ranges(numbers: tuple[int, ...]) -> str:
    """`7`, `{0..29}`, `{0..3,5}`."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    text = ",".join(f"{run[0]}" if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs)
    return text if len(numbers) == 1 else f"{{{text}}}"
