"""Which modules and parameters a config chooses, with PEFT's matching rules, from the module table alone.

Deviations from PEFT, on purpose: a shared module is matched under any of its paths; ties are read from the tensors, not from
module names; `layers_to_transform` also filters "all-linear"; entries that match nothing are reported with the nearest names.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from ..config import AdapterConfig, by_pattern
from ..errors import NothingToAdaptError, RecipeError
from ..target import ModuleRecord, ModuleTable, Target
from . import defaults, moe
from .kinds import Refusal, module_targets, parameter_target
from .matching import Unmatched, compiled, inside, matcher, nearest, paths_of, report_unmatched
from .saved import SavedModule, choose_saved, tied_group, tied_targets
from .tokens import TokenRows, choose_tokens
from .wrappers import with_file_paths


@dataclass(frozen=True)
class Selection:
    """What a config chooses. tied: path of an adapted module -> path of the adapted embedding it must stay tied to."""

    targets: tuple[Target, ...]
    refusals: tuple[Refusal, ...] = ()
    saved: tuple[SavedModule, ...] = ()
    tokens: tuple[TokenRows, ...] = ()
    tied: dict[str, str] = field(default_factory=dict)
    unmatched: tuple[Unmatched, ...] = ()


def select(table: ModuleTable, config: AdapterConfig) -> Selection:
    """The targets, saved modules and token rows that `config` chooses in `table`.

    Raises RecipeError if it chooses nothing, if everything it chooses is excluded, or if a pattern is no regex.
    """
    saved, saved_refusals, missing_saved = choose_saved(table, config)
    modules, excluded, missing_modules = choose_modules(table, config, saved)
    tied = {} if any(s.source for s in saved) else tied_targets(table, config, modules)
    chosen = {*(r.path for r in modules), *tied}
    modules = [r for r in table.records if r.path in chosen]
    targets, refusals = targets_of_modules(table, config, modules)
    targets, parameter_refusals, missing_parameters = add_parameters(table, config, targets, saved)
    targets = with_file_paths(targets)
    tokens, token_refusals = choose_tokens(table, config, targets, saved)
    refusals = [*saved_refusals, *refusals, *parameter_refusals, *token_refusals]
    unmatched = [*missing_modules, *missing_parameters, *missing_saved, *unmatched_patterns(config, targets)]
    used = tied or tokens or any(s.source for s in saved)
    if config.ensure_weight_tying and not type(config).ensure_weight_tying and not (tied_group(table) and used):
        unmatched.append(Unmatched("ensure_weight_tying", "tied weights"))
    if not targets and not refusals and config.target_modules != defaults.NO_TARGETS:
        raise nothing_chosen(table, config, excluded, [*missing_modules, *missing_parameters])
    return Selection(tuple(targets), tuple(refusals), tuple(saved), tuple(tokens), tied, tuple(unmatched))


# Modules


def completed(table: ModuleTable, config: AdapterConfig) -> AdapterConfig:
    """The config with the model type's default in other fields that name modules, as far as these are targets, and with
    the parameters that hold what it names as modules (`moe.py`). Completing it again changes nothing.
    """
    new = copy.copy(config)
    for name, by_type in defaults.DEFAULT_NAMES.get(config.peft_type, {}).items():
        if getattr(config, name) is None and table.model_type in by_type:
            targets, found = config.target_modules, by_type[table.model_type]
            setattr(new, name, [n for n in found if n in targets] if isinstance(targets, set) else found)
    return moe.converted(table, new, lambda more: last_parts(table, new, more), moe.NAMES.get(table.model_type))


def last_parts(table: ModuleTable, config: AdapterConfig, more: Iterable[str]) -> set[str]:
    """The last parts of the paths that a `target_modules` string chooses among modules and `more`: "all-linear" all of these."""
    more = list(more)
    entries = config.target_modules
    if isinstance(entries, str) and entries.lower() == defaults.ALL_LINEAR:
        heads = heads_left_out(table, config)
        paths = [r.path for r in table.records if r.is_a("Linear", "Conv1D") and r.path not in heads] + more
    else:
        matches = matcher("target_modules", config.target_modules)
        excluded = matcher("exclude_modules", config.exclude_modules)
        known = [r.path for r in table.records if r.path] + more
        paths = [path for path in known if matches(path) and not excluded(path)]
    return {path.rpartition(".")[2] for path in paths}


def resolved_target_modules(table: ModuleTable, config: AdapterConfig) -> list[str] | set[str] | str:
    """`target_modules`, with the model type's default where it is None; [] if only parameters are chosen."""
    if config.target_modules is not None:
        return config.target_modules
    default = defaults.DEFAULT_TARGETS.get(config.peft_type, {}).get(table.model_type)
    if config.target_parameters and (default is None or table.model_type in defaults.PARAMETERS_ALONE):
        return []
    default = default or config.fallback_targets(table)
    if default is None:
        raise RecipeError(
            f"name target_modules or target_parameters: {config.peft_type} has no default for model type "
            f"{table.model_type!r}"
        )
    return default


def choose_modules(
    table: ModuleTable, config: AdapterConfig, saved: list[SavedModule]
) -> tuple[list[ModuleRecord], set[str], list[Unmatched]]:
    """(chosen records, paths that matched but are excluded, entries that matched no path)."""
    entries = resolved_target_modules(table, config)
    all_linear = isinstance(entries, str) and entries.lower() == defaults.ALL_LINEAR
    matches = matcher("target_modules", [] if all_linear or entries == defaults.NO_TARGETS else entries)
    excluded_by, in_layer = matcher("exclude_modules", config.exclude_modules), layer_filter(config)
    heads = heads_left_out(table, config)
    chosen, excluded, seen, seen_exclusions = [], set(), set(), set()
    for record in table.records:
        if not record.path:
            continue
        paths = paths_of(record)
        found = {path: matches(path) for path in paths}
        seen |= set().union(*found.values())
        exclusions = set().union(*map(excluded_by, paths))
        seen_exclusions |= exclusions
        if all_linear:
            wanted = record.is_a("Linear", "Conv1D") and record.path not in heads
            kept = wanted and any(map(in_layer, paths))
        else:
            wanted = any(found.values())
            exact = not isinstance(entries, str) and any(path in entries for path in paths)
            kept = exact or any(in_layer(path) for path in paths if found[path])
        if wanted and (exclusions or any(inside(path, s.path) for path in paths for s in saved)):
            excluded.add(record.path)
        elif kept:
            chosen.append(record)
    every_path = [path for record in table.records for path in paths_of(record)]
    named = [] if all_linear or entries == defaults.NO_TARGETS else entries
    unmatched = report_unmatched("target_modules", named, seen, every_path)
    return (
        chosen,
        excluded,
        unmatched + report_unmatched("exclude_modules", config.exclude_modules, seen_exclusions, every_path),
    )


def heads_left_out(table: ModuleTable, config: AdapterConfig) -> set[str]:
    """Modules that "all-linear" does not mean: the output head, or a classifier's head."""
    if table.output_head is not None:
        return {table.output_head}
    if table.model_type is None or config.task_type != "SEQ_CLS":
        return set()
    return {next((name for name in defaults.CLASSIFIER_HEADS if name in table), "")}


def layer_filter(config: AdapterConfig) -> Callable[[str], bool]:
    """path -> whether `layers_to_transform` keeps it: the first number after a layer list is its index."""
    layers = config.layers_to_transform
    if layers is None or layers == []:
        return lambda path: True
    wanted = {layers} if isinstance(layers, int) else set(layers)
    names = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern
    patterns = [rf"(?:^|.*?\.){name}\.(?P<idx>\d+)\." for name in names or ()] or [r".*?\.[^.]*\.(?P<idx>\d+)\."]
    compiled_patterns = [compiled("layers_pattern", p) for p in patterns]

    def keeps(path: str) -> bool:
        found = next((m for p in compiled_patterns if (m := p.match(path))), None)
        return found is not None and int(found["idx"]) in wanted

    return keeps


def targets_of_modules(
    table: ModuleTable, config: AdapterConfig, modules: list[ModuleRecord]
) -> tuple[list[Target], list[Refusal]]:
    """Each parameter once, even where an attention module and its own projection are both named."""
    targets: dict[str, Target] = {}
    refusals: list[Refusal] = []
    mamba = table.model_type in defaults.MAMBA_MODELS and config.peft_type in defaults.MAMBA_REFUSES
    for record in modules:
        read = module_targets(record)
        if mamba and record.path.rpartition(".")[2] in defaults.MAMBA_MODULES:
            read = Refusal(record.path, f"{table.model_type} reads this weight in a fused kernel, past the module, where no "
                           f"{config.peft_type} adapter acts: leave it out of the targets")  # fmt: skip
        if isinstance(read, Refusal):
            refusals.append(read)
            continue
        for target in read:
            targets.setdefault(target.name, target)
    return list(targets.values()), refusals


# Parameters


def add_parameters(
    table: ModuleTable, config: AdapterConfig, targets: list[Target], saved: list[SavedModule]
) -> tuple[list[Target], list[Refusal], list[Unmatched]]:
    """`targets` and those of `target_parameters`; a module is chosen either whole or by parameters."""
    matches = matcher("target_parameters", config.target_parameters)
    modules, seen = {t.path for t in targets}, set[str]()
    found: list[Target] = []
    refusals: list[Refusal] = []
    for record in table.records:
        for name in record.parameters:
            matched = set().union(*(matches(f"{path}.{name}" if path else name) for path in paths_of(record)))
            seen |= matched
            if not matched or any(inside(path, s.path) for path in paths_of(record) for s in saved):
                continue
            read = parameter_target(record, name)
            if record.path in modules and isinstance(read, Target):
                read = Refusal(read.name, "target_modules chooses its module too; set target_modules=[] to avoid it")
            if isinstance(read, Refusal):
                refusals.append(read)
            else:
                found.append(read)
    names = [f"{r.path}.{name}" for r in table.records for name in r.parameters]
    return [*targets, *found], refusals, report_unmatched("target_parameters", config.target_parameters, seen, names)


# Reports


def unmatched_patterns(config: AdapterConfig, targets: list[Target]) -> list[Unmatched]:
    """Keys of rank_pattern and the like that match no target."""
    found = []
    for name in config.patterns:
        for key in getattr(config, name, None) or {}:
            compiled(name, key)
            if not any(by_pattern({key: True}, t.pattern_path, False) for t in targets):
                found.append(Unmatched(name, key, nearest(key, (t.pattern_path for t in targets))))
    return found


def nothing_chosen(
    table: ModuleTable, config: AdapterConfig, excluded: set[str], unmatched: list[Unmatched]
) -> NothingToAdaptError:
    """The error for a config without any target, by cause."""
    if excluded:
        names = ", ".join(sorted(excluded)[:5]) + (", ..." if len(excluded) > 5 else "")
        return NothingToAdaptError(
            f"everything that target_modules matches is excluded, by exclude_modules or modules_to_save: {names}"
        )
    wanted = resolved_target_modules(table, config)
    text = f"nothing to adapt: target_modules={wanted!r}, target_parameters={config.target_parameters!r}"
    details = [str(u) for u in unmatched if u.field != "exclude_modules"]
    if config.layers_to_transform is not None:
        details.append(f"layers_to_transform={config.layers_to_transform}, layers_pattern={config.layers_pattern}")
    return NothingToAdaptError("\n  ".join([text, *details]))
