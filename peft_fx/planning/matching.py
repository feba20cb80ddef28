"""Names in configs against the paths of modules, as PEFT matches them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from ..errors import RecipeError
from ..suggestions import lookalikes
from ..target import ModuleRecord


@dataclass(frozen=True)
class Unmatched:
    """An entry of a config field that matched nothing, and the names that come close."""

    field: str
    entry: str
    nearest: tuple[str, ...] = ()

    def __str__(self) -> str:
        near = f"; nearest: {', '.join(self.nearest)}" if self.nearest else ""
        return f"{self.field}: {self.entry!r} matches nothing{near}"


def suffixes(path: str) -> Iterator[str]:
    """The path and each of its tails that starts at a component border."""
    yield path
    while "." in path:
        path = path.partition(".")[2]
        yield path


def matcher(field: str, entries: Iterable[str] | str | None) -> Callable[[str], set[str]]:
    """path -> the entries that match it: a regex must match the whole path, a name its end at a component border."""
    if not entries:
        return lambda path: set()
    if isinstance(entries, str):
        pattern = compiled(field, entries)
        return lambda path: {entries} if pattern.fullmatch(path) else set()
    names = set(entries)
    return lambda path: names.intersection(suffixes(path))


def ending_matcher(entries: Iterable[str]) -> Callable[[str], set[str]]:
    """path -> the entries that it ends with, wherever these begin: PEFT's rule for modules that get a trained copy."""
    names = [e for e in entries if e]
    return lambda path: {e for e in names if path.endswith(e)}


def compiled(field: str, pattern: str) -> re.Pattern:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise RecipeError(f"{field}: {pattern!r} is no regular expression: {error}") from error


def paths_of(record: ModuleRecord) -> tuple[str, ...]:
    return (record.path, *record.aliases)


def nearest(entry: str, names: Iterable[str]) -> tuple[str, ...]:
    """Up to three names, whole or last components, that look like `entry`."""
    names = [n for n in names if n]
    known = dict.fromkeys([*(n.rpartition(".")[2] for n in names), *names])
    return lookalikes(entry, known, 3, 0.5)


def report_unmatched(
    field: str, entries: Iterable[str] | str | None, matched: set[str], names: Iterable[str]
) -> list[Unmatched]:
    names = list(names)
    entries = [entries] if isinstance(entries, str) else entries or []
    return [Unmatched(field, e, nearest(e, names)) for e in entries if e not in matched]


def inside(path: str, module: str) -> bool:
    return path == module or path.startswith(f"{module}.")
