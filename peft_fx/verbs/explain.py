"""What a graph will do and has done to its targets, as data; `explanation` prints it."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from torch import fx

from ..passes.inject import lower
from ..passes.match import describe, parameter_nodes, sites
from ..planning.kinds import Refusal, module_targets, parameter_target
from ..planning.plan import Plan, make_plan
from ..recipe import as_recipe
from ..store import Resident, State, state_of
from ..tables import Table, as_html
from ..target import ModuleRecord, Target
from .derive import acting, planned
from .explanation import Explanation
from .rows import Row


class ParameterCount(NamedTuple):
    """Numbers of elements; `str` is PEFT's line."""

    trainable: int
    total: int

    @property
    def share(self) -> float:
        """Of those that are trained, in percent."""
        return 100 * self.trainable / self.total if self.total else 0.0

    def __str__(self):
        return f"trainable params: {self.trainable:,} || all params: {self.total:,} || trainable%: {self.share:.4f}"

    def _repr_html_(self):
        cells = [f"{self.trainable:,}", f"{self.total:,}", f"{self.share:.4f}"]
        heads = ("trainable params", "all params", "trainable%")
        return as_html([Table(heads, [cells], frozenset(heads))])


def trainable_parameters(graph: fx.GraphModule) -> ParameterCount:
    """Counts elements of parameters, tied ones once: those that require grad, and all."""
    parameters = list(graph.parameters())
    return ParameterCount(sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters))


def explain(graph: fx.GraphModule, recipe=None) -> Explanation:
    """Every target of the resident adapters, or of a `recipe` that has not been applied: what was decided and why."""
    state = state_of(graph, "explain")
    rows = []
    if recipe is not None:
        for name, config in as_recipe(recipe, "default").items():
            plan = make_plan(state.table, name, config, strict=False)
            rows += rows_of(graph, state, plan, Resident(config), name, "planned")
        return Explanation(tuple(rows))
    for name, resident in state.recipe.items():
        on = acting(graph, state) if state.slots else state.active
        status = "merged" if name in state.merged else "active" if name in on else "resident"
        rows += rows_of(graph, state, planned(state, name, resident.config), resident, name, status)
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
