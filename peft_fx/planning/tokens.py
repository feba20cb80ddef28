"""Rows of embeddings that are trained: `trainable_token_indices`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..config import AdapterConfig
from ..errors import RecipeError
from ..target import ModuleRecord, ModuleTable, Target
from .kinds import Refusal, module_targets
from .matching import Unmatched, ending_matcher, inside, nearest, paths_of
from .saved import SavedModule, tied_group


@dataclass(frozen=True)
class TokenRows:
    """Rows of an embedding (or head) that are trained. source: the embedding whose rows it uses, if tied."""

    target: Target
    ids: tuple[int, ...]
    source: str | None = None


def choose_tokens(
    table: ModuleTable, config: AdapterConfig, targets: list[Target], saved: list[SavedModule]
) -> tuple[list[TokenRows], list[Refusal]]:
    """The embedding rows to train. Raises RecipeError for unknown modules, ids outside the vocabulary, conflicts."""
    wanted = config.trainable_token_indices
    if wanted is None:
        return [], []
    if not isinstance(wanted, dict):
        wanted = {table.input_embedding or "embed_tokens": wanted}
    adapted, rows, refusals = {t.path for t in targets}, {}, []
    for entry, ids in wanted.items():
        matches = ending_matcher([entry])
        found = [r for r in table.records if r.path and any(map(matches, paths_of(r)))]
        if not found:
            near = nearest(entry, (r.path for r in table.records))
            raise RecipeError(f"{Unmatched('trainable_token_indices', entry, near)}")
        for record in found:
            if any(inside(record.path, s.path) for s in saved):
                raise RecipeError(f"{record.path} is in modules_to_save and in trainable_token_indices: choose one")
            read = token_target(record)
            if record.path in adapted and isinstance(read, Target):
                read = Refusal(record.path, "is in target_modules and in trainable_token_indices: choose one")
            if isinstance(read, Refusal):
                refusals.append(read)
            else:
                rows[record.path] = TokenRows(read, checked_ids(ids, read))
    return tie_tokens(table, config, rows), refusals


def token_target(record: ModuleRecord) -> Target | Refusal:
    """The weight (vocabulary, features) of an embedding or a linear head."""
    read = module_targets(record)
    if isinstance(read, Refusal):
        return read
    if len(read) == 1 and (read[0].kind, read[0].transposed) in (("embedding", True), ("linear", False)):
        return read[0]
    return Refusal(record.path, f"trainable_token_indices needs an embedding or a Linear head, not {record.type}")


def vocabulary(target: Target) -> int:
    return target.in_features if target.transposed else target.out_features


def checked_ids(ids: Any, target: Target) -> tuple[int, ...]:
    if not isinstance(ids, list) or not ids or any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
        raise RecipeError(f"trainable_token_indices for {target.path}: expected a list of token ids, got {ids!r}")
    outside = [i for i in ids if not 0 <= i < vocabulary(target)]
    if outside:
        raise RecipeError(
            f"trainable_token_indices for {target.path}: {outside[:5]} lie outside its {vocabulary(target)} tokens; "
            "resize the embedding first"
        )
    if len(set(ids)) != len(ids):
        raise RecipeError(f"trainable_token_indices for {target.path}: the same token is named twice")
    return tuple(ids)


def tie_tokens(table: ModuleTable, config: AdapterConfig, rows: dict[str, TokenRows]) -> list[TokenRows]:
    """Modules tied to the embedding use its rows, unless they are given ids of their own."""
    group, source = tied_group(table), rows.get(table.input_embedding or "")
    own = {path: rows[path].ids for path in group if path in rows}
    if source is None or not group:
        return list(rows.values())
    if any(ids != source.ids for ids in own.values()):
        if config.ensure_weight_tying:
            raise RecipeError(
                "ensure_weight_tying needs the same trainable_token_indices for all tied modules, got "
                f"{source.target.path}: {list(source.ids)}, " + ", ".join(f"{p}: {list(i)}" for p, i in own.items())
            )
        return list(rows.values())
    tied = [token_target(table[path]) for path in group]
    rest = [r for path, r in rows.items() if path not in group]
    return [*rest, *(TokenRows(t, source.ids, source.target.path) for t in tied if isinstance(t, Target))]
