"""What could be adapted, from the module table: the targets that modules stand for, and which of them a table cannot tell."""

from __future__ import annotations

from collections.abc import Iterator

from ..target import ModuleRecord, ModuleTable, Target
from .kinds import Refusal, module_targets, parameter_target


def possible_targets(table: ModuleTable) -> Iterator[Target]:
    """Every parameter that an operator may read as a weight, in the table's order."""
    return (target for record in table.records for target in readable(record))


def readable(record: ModuleRecord) -> list[Target]:
    """The targets of a module, and those of its parameters that only `target_parameters` can name."""
    read = module_targets(record)
    targets = [] if isinstance(read, Refusal) else list(read)
    others = record.attributes.get("kinds", {}).keys() - {t.parameter for t in targets if t.path == record.path}
    by_name = (parameter_target(record, name) for name in record.parameters if name in others)
    return targets + [t for t in by_name if isinstance(t, Target)]


def undecided(table: ModuleTable) -> set[str]:
    """Names of parameters of which only a graph says whether and how they are weights.

    Matrices and stacks in classes that `kinds` does not know (experts, routers, tables of positions), and tied weights of
    modules of one class, of which the model may call some alone (T5's `shared` beside its stacks' embeddings).
    """
    known = {t.name for t in possible_targets(table)}
    unknown = {
        name
        for record in table.records
        for parameter, shape in record.parameters.items()
        if len(shape) > 1 and (name := f"{record.path}.{parameter}" if record.path else parameter) not in known
    }
    owners = {name: table[name.rpartition(".")[0]].type for group in table.tied for name in group}
    alike = (g for g in table.tied if len({owners[name] for name in g}) < len(g))
    return unknown.union(*alike)
