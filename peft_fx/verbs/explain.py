"""What a graph will do and has done to its targets, as data and as a table."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from torch import fx

from ..passes.inject import lower
from ..passes.match import describe, parameter_nodes, sites
from ..planning.kinds import Refusal, module_targets, parameter_target
from ..planning.plan import Plan, make_plan
from ..recipe import as_recipe
from ..store import Resident, State, state_of
from ..target import ModuleRecord, Target
from .derive import acting, planned


class ParameterCount(NamedTuple):
    """Numbers of elements; `str` is PEFT's line."""

    trainable: int
    total: int

    def __str__(self):
        share = 100 * self.trainable / self.total if self.total else 0.0
        return f"trainable params: {self.trainable:,} || all params: {self.total:,} || trainable%: {share:.4f}"


def trainable_parameters(graph: fx.GraphModule) -> ParameterCount:
    """Counts elements of parameters, tied ones once: those that require grad, and all."""
    parameters = list(graph.parameters())
    return ParameterCount(sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters))


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
class Explanation:
    """Every target with its decision; printing it draws the table."""

    rows: tuple[Row, ...]

    def table(self) -> Table:
        table = Table(title=f"{len(self.rows)} targets")
        for column in (
            "adapter",
            "target",
            "kind",
            "shape",
            "storage",
            "method",
            "lowering",
            "parameters",
            "status",
            "reason",
        ):
            table.add_column(column, justify="right" if column == "parameters" else "left", overflow="fold")
        for r in self.rows:
            shape = "x".join(map(str, r.shape))
            table.add_row(
                r.adapter,
                r.target,
                r.kind,
                shape,
                r.storage,
                r.method,
                r.lowering,
                f"{r.parameters:,}",
                r.status,
                r.reason,
            )
        return table

    def __str__(self):
        console = Console(width=160, file=io.StringIO())
        console.print(self.table())
        return console.file.getvalue()


def explain(graph: fx.GraphModule, recipe=None) -> Explanation:
    """Every target of the resident adapters, or of a `recipe` that has not been applied: what was decided and why."""
    state = state_of(graph, "explain")
    rows = []
    if recipe is not None:
        for name, config in as_recipe(recipe, "default").items():
            plan = make_plan(state.table, name, config, strict=False)
            rows += rows_of(graph, state, plan, Resident(config), name, "planned")
        return Explanation(tuple(rows))
    on = acting(graph, state) if state.gated else state.active
    for name, place in state.residents.items():
        status = "merged" if place in state.merged else "active" if place in on else "resident"
        resident = state.recipe[place]
        rows += rows_of(graph, state, planned(state, place, resident.config), resident, name, status)
    return Explanation(tuple(rows))


def possible_targets(graph: fx.GraphModule) -> Explanation:
    """Every parameter that an adapter could take, and the lowering that an additive method would get there."""
    state = state_of(graph, "explain")
    nodes, rows = parameter_nodes(state.base.graph), []
    for target in (t for record in state.table.records for t in readable(record) if t.name in nodes):
        found, reason = sites(nodes[target.name])
        if found or target.kind != "norm":
            lowering = "weight" if reason else "activation"
            rows.append(Row("", target.name, target.kind, target.shape, "dense", "", lowering, 0, "possible",
                            describe(found, reason)))  # fmt: skip
    return Explanation(tuple(rows))


def readable(record: ModuleRecord) -> list[Target]:
    """The targets of a module, and those of its parameters that only `target_parameters` can name."""
    read = module_targets(record)
    targets = [] if isinstance(read, Refusal) else list(read)
    others = record.attributes.get("kinds", {}).keys() - {t.parameter for t in targets if t.path == record.path}
    by_name = (parameter_target(record, name) for name in record.parameters if name in others)
    return targets + [t for t in by_name if isinstance(t, Target)]


def rows_of(
    graph: fx.GraphModule, state: State, plan: Plan, resident: Resident, adapter: str, status: str
) -> list[Row]:
    config = resident.config
    asked = [replace(p, lowering=resident.lowering) for p in plan.placements]
    base = state.base.graph
    nodes = parameter_nodes(base)
    errors = {r["target"]: r["rounding_error"] for r in state.merge_report}
    rows = []
    for x in lower(base, asked, state.base.traces):
        p = x.placement
        read = describe(*sites(nodes[p.target.name])) if p.target.name in nodes else "not read by the graph"
        note = x.reason or read
        error = errors.get(p.target.name) if status == "merged" else None
        if error is not None:
            note = f"rounding error {error:.1e}"
        added = sum(numel(t.shape) for n, t in p.tensors.items() if t.trainable and n not in p.shared)
        rows.append(Row(adapter, p.target.name, p.target.kind, p.target.shape, "dense", p.method, x.form, added,
                        "refused" if x.form == "refused" else status, note, error))  # fmt: skip
    rows += [
        Row(adapter, r.target_name, "", (), "", config.peft_type, "", 0, "refused", r.reason) for r in plan.refusals
    ]
    rows += [
        Row(adapter, str(u.entry), "", (), "", config.peft_type, "", 0, "unmatched", str(u)) for u in plan.unmatched
    ]
    return rows


def numel(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
