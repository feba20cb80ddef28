"""Names that differ in layer numbers alone as one: `model.layers.{0..29}.self_attn.q_proj`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")
Path = tuple[str | tuple[int, ...], ...]  # components; a number, or the numbers that were folded, as a tuple


def folded_names(names: Iterable[str]) -> list[str]:
    """Names of parameters, those that differ in layer numbers alone as one."""
    return [joined(path) for path, _ in gathered(((), components(name), name) for name in names)]


def gathered(items: Iterable[tuple[tuple, Path, T]]) -> list[tuple[Path, list[T]]]:
    """Folds (what has to be equal, path, item), one component of the paths after the other."""
    groups: dict[tuple, list[T]] = {}
    for key, path, item in items:
        groups.setdefault((key, path), []).append(item)
    for position in reversed(range(max((len(path) for _, path in groups), default=0))):
        groups = merged(groups, position)
    return [(path, members) for (_, path), members in groups.items()]


def merged(groups: dict[tuple, list[T]], position: int) -> dict[tuple, list[T]]:
    """Folds one component: groups that are equal everywhere else become one."""
    result: dict[tuple, tuple[set[int], list[T]]] = {}
    for (key, path), members in groups.items():
        numbers = path[position] if position < len(path) else None
        rest = (key, path[:position], path[position + 1 :]) if isinstance(numbers, tuple) else (key, path, None)
        values, items = result.setdefault(rest, (set(), []))
        values.update(numbers if isinstance(numbers, tuple) else ())
        items += members
    return {
        (key, head if tail is None else (*head, tuple(sorted(values)), *tail)): items
        for (key, head, tail), (values, items) in result.items()
    }


def components(name: str) -> Path:
    return tuple((int(part),) if part.isdecimal() else part for part in name.split("."))


def joined(path: Path) -> str:
    return ".".join(part if isinstance(part, str) else ranges(part) for part in path)


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
