"""What a graph will do and has done to its targets, as data; `explanation` prints it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch import fx, nn

from ..config import AdapterConfig
from ..engine.derive import acting
from ..errors import GraphError
from ..passes.inject.inject import Lowering, lower
from ..passes.match.readers import describe, parameter_nodes, sites
from ..planning.plan import Placement, Plan, make_plan
from ..planning.possible import possible_targets
from ..recipe import as_recipe
from ..store.state import State, base_of, state_of
from ..tables import Table, as_html
from .explanation import Explanation
from .rows import Row, possible_row


class ParameterCount(NamedTuple):
    """Numbers of elements; `str` is PEFT's line."""

    trainable: int
    total: int

    @property
    def share(self) -> float:
        """Of those that are trained, in percent."""
        return 100 * self.trainable / self.total if self.total else 0.0

    def __str__(self) -> str:
        return f"trainable params: {self.trainable:,} || all params: {self.total:,} || trainable%: {self.share:.4f}"

    def _repr_html_(self) -> str:
        cells = [f"{self.trainable:,}", f"{self.total:,}", f"{self.share:.4f}"]
        heads = ("trainable params", "all params", "trainable%")
        return as_html([Table(heads, [cells], frozenset(heads))])


def trainable_parameters(graph: fx.GraphModule) -> ParameterCount:
    """Counts elements of parameters, tied ones once: those that require grad, and all. graph: any module, in fact."""
    if not isinstance(graph, nn.Module):
        raise GraphError(f"trainable_parameters counts those of a graph or a model, got {type(graph).__name__}")
    parameters = list(graph.parameters())
    return ParameterCount(sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters))


def explain(graph: fx.GraphModule, recipe: Any = None) -> Explanation:
    """Every target of the resident adapters, or of a `recipe` that has not been applied: what was decided and why.

    Printed, targets of equal layers are one line; `.rows` has each.
    """
    state, rows = state_of(graph, "explain"), []
    if recipe is not None:
        new = as_recipe(recipe, "default")
        plans = {name: make_plan(state.table, name, config, strict=False) for name, config in new.items()}
        asked = [p for plan in plans.values() for p in plan.placements]
        decided = decisions(state, asked, state.placed(state.acting))
        for name, plan in plans.items():
            rows += rows_of(state, plan, decided.get(name, ()), new[name], name, "planned")
        return Explanation(tuple(rows))
    on = acting(graph, state) if state.gated else state.acting
    together = [] if state.mixed else [state.acting, state.merged]
    together += [(place,) for place in state.recipe if not any(place in places for places in together)]
    decided = {}
    for places in together:
        decided |= decisions(state, state.placed(places))
    for name, place in state.residents.items():
        status = "merged" if place in state.merged else "active" if place in on else "resident"
        resident = state.recipe[place]
        rows += rows_of(state, resident.plan, decided.get(place, ()), resident.config, name, status)
    return Explanation(tuple(rows))


def decisions(state: State, asked: Sequence[Placement], present: Sequence[Placement] = ()) -> dict[str, list[Lowering]]:
    """Adapter -> the lowerings of its placements, of adapters that act together, after those that are `present`."""
    decided: dict[str, list[Lowering]] = {}
    base = base_of(state)
    for x in lower(base.graph, [*present, *asked], base.traces)[len(present) :]:
        decided.setdefault(x.placement.adapter, []).append(x)
    return decided


def possible(graph: fx.GraphModule) -> Explanation:
    """Every parameter that an adapter could take, and the lowering that an additive method would get there."""
    state = state_of(graph, "explain")
    nodes, rows = parameter_nodes(base_of(state).graph), []
    for target in (t for t in possible_targets(state.table) if t.name in nodes):
        found, reason = sites(nodes[target.name])
        if found or target.kind != "norm":
            rows.append(possible_row(target, "weight" if reason else "activation", describe(found, reason)))
    return Explanation(tuple(rows))


def rows_of(
    state: State, plan: Plan, decided: Iterable[Lowering], config: AdapterConfig, adapter: str, status: str
) -> list[Row]:
    """Rows of what was decided for an adapter, of its refused targets and of entries that match nothing."""
    errors = {r["target"]: r["rounding_error"] for r in state.merge_report}
    rows = []
    for x in decided:
        p = x.placement
        note = x.reason or describe(x.sites, "")
        error = errors.get(p.target.name) if status == "merged" else None
        if error is not None:
            note = f"rounding error {error:.1e}"
        added = sum(numel(t.shape) for n, t in p.tensors.items() if t.trainable and n not in p.shared)
        rows.append(Row(adapter, p.target.name, p.target.kind, p.target.shape, "dense", p.method, x.form, added,
                        "refused" if x.form == "refused" else status, note, error))  # fmt: skip
    left_out = [(r.target_name, "refused", r.reason) for r in plan.refusals]
    left_out += [(str(u.entry), "unmatched", str(u)) for u in plan.unmatched]
    return rows + [
        Row(adapter, name, "", (), "", config.peft_type or "", "", 0, status, why) for name, status, why in left_out
    ]


def numel(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
