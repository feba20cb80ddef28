"""Modules that are trained whole: those of `modules_to_save`, and the heads that belong to the task."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..config import AdapterConfig
from ..target import ModuleRecord, ModuleTable
from .defaults import TASK_HEADS
from .kinds import CONTAINERS, Refusal
from .matching import Unmatched, ending_matcher, inside, paths_of, report_unmatched


@dataclass(frozen=True)
class SavedModule:
    """A module that gets its own trained copy. source: path of the saved module whose weight it keeps sharing."""

    path: str
    source: str | None = None


def names_to_save(config: AdapterConfig, names: Iterable[str]) -> list[str] | None:
    """`modules_to_save` with those heads of the task that a model whose modules have these names has; None for none."""
    names = list(names)
    heads = (h for h in TASK_HEADS.get(config.task_type, ()) if any(name.endswith(h) for name in names))
    return list(dict.fromkeys([*(config.modules_to_save or ()), *heads])) or None


def choose_saved(table: ModuleTable, config: AdapterConfig) -> tuple[list[SavedModule], list[Refusal], list[Unmatched]]:
    """The outermost modules that `modules_to_save` and the task type name."""
    heads = TASK_HEADS.get(config.task_type, ())
    matches = ending_matcher(dict.fromkeys([*(config.modules_to_save or ()), *heads]))
    saved: list[SavedModule] = []
    refusals: list[Refusal] = []
    seen: set[str] = set()
    for record in table.records:
        matched = set().union(*map(matches, paths_of(record))) if record.path else set()
        seen |= matched
        if not matched or any(inside(record.path, s.path) for s in saved):
            continue
        if record.is_a(*CONTAINERS):
            refusals.append(Refusal(record.path, f"modules_to_save: a {record.type} has no forward of its own"))
            continue
        saved.append(SavedModule(record.path))
    names = [path for record in table.records for path in paths_of(record)]
    # PEFT's files name every head that the task could have, so a missing one is no mistake
    asked = [m for m in config.modules_to_save or () if m not in heads]
    unmatched = report_unmatched("modules_to_save", asked, seen, names)
    return tie_saved(table, config, saved), refusals, unmatched


def tied_group(table: ModuleTable) -> tuple[str, ...]:
    """Paths of the modules whose weight is the input embedding's, that one excluded."""
    if table.input_embedding is None:
        return ()
    return tuple(name.rpartition(".")[0] for name in table.tied_to(f"{table.input_embedding}.weight"))


def tie_saved(table: ModuleTable, config: AdapterConfig, saved: list[SavedModule]) -> list[SavedModule]:
    """With `ensure_weight_tying`, saving one of the tied modules saves all of them, sharing one weight."""
    group = tied_group(table) if config.ensure_weight_tying else ()
    embedding = table.input_embedding
    everyone = (embedding, *group)
    if embedding is None or not group or not any(s.path in everyone for s in saved):
        return saved
    rest = [s for s in saved if s.path not in everyone]
    return [SavedModule(embedding), *(SavedModule(p, embedding) for p in group), *rest]


def tied_targets(table: ModuleTable, config: AdapterConfig, modules: list[ModuleRecord]) -> dict[str, str]:
    """With `ensure_weight_tying`, adapting one tied module adapts all: each path -> the embedding's, its own too."""
    group = tied_group(table) if config.ensure_weight_tying else ()
    embedding = table.input_embedding
    if embedding is None or not group or not any(r.path in (embedding, *group) for r in modules):
        return {}
    return dict.fromkeys((embedding, *group), embedding)
