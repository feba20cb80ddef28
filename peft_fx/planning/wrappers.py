"""How PEFT's wrapper modules show in the keys of its files, as pure functions over paths.

PEFT replaces an adapted module by a wrapper that holds it as `base_layer`, so whatever lies inside an adapted module is
filed one `base_layer` deeper. Several parameters of one module are wrapped one by one, in the order in which the module
registers them: the first is innermost.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from ..target import Target

BASE = ".base_layer"


def wrap_counts(targets: list[Target]) -> dict[str, int]:
    """Module path -> number of wrappers around it."""
    return Counter(t.path for t in targets)


def inside_path(path: str, counts: dict[str, int]) -> str:
    """The path of a module as filed, without its own wrappers."""
    filed, seen = "", ""
    for part in path.split("."):
        filed += BASE * counts.get(seen, 0) if seen else ""
        filed, seen = (f"{filed}.{part}" if filed else part), (f"{seen}.{part}" if seen else part)
    return filed


def base_path(path: str, counts: dict[str, int]) -> str:
    """The path under which what the module at `path` owned itself is filed, e.g. its bias."""
    return inside_path(path, counts) + BASE * counts.get(path, 0)


def with_file_paths(targets: list[Target]) -> list[Target]:
    """The targets of one adapter, in registration order, each with its `file_path`."""
    counts, seen, filed = wrap_counts(targets), Counter[str](), []
    for target in targets:
        seen[target.path] += 1
        outer = BASE * (counts[target.path] - seen[target.path])
        filed.append(replace(target, file_path=inside_path(target.path, counts) + outer))
    return filed
