"""What `inspect` shows of a graph: planned, derived and looked at, with what every pass did."""

from __future__ import annotations

from torch import fx

from ..passes.core.base import Report, op_counts, settings
from ..recipe import Recipe
from ..store.state import base_of, state_of
from ..store.tensors import store_of
from ..verbs.explain import explain, possible
from ..verbs.preview import preview
from .facts import Inspection, Step, model_of
from .model import Archive, Built
from .terminal import working
from .views import view_of


def inspected(source: str, opened: Archive | Built, recipe: Recipe | None, target: str | None) -> Inspection:
    """The graph with a recipe's adapters; without one those in it, else what could be adapted. Raises PeftFxError."""
    reports: list[tuple[Report, fx.GraphModule, int]] = []

    def keep(report: Report, gm: fx.GraphModule) -> None:
        reports.append((report, gm, sum(op_counts(gm).values())))

    with settings(on_report=keep):
        base = shown = opened.graph()
        rows = explain(base).rows
        if recipe is not None:
            with working("splicing"):
                recipe = renamed(recipe, set(state_of(base).recipe))
                shown = preview(base, recipe)
                rows += explain(shown, recipe).rows
    rows = rows or possible(base).rows
    state = state_of(shown)
    steps = tuple(step(report, after) for report, gm, after in reports if gm is base or gm is shown)
    before = base_of(state).graph
    nodes = (len(before.nodes), len(shown.graph.nodes))
    view = view_of(before, shown.graph, target, [r.target for r in rows], state.table)
    model = model_of(source, state.table, base, opened.weights, mode_of(base))
    return Inspection(model, rows, steps, nodes, view)


def mode_of(graph: fx.GraphModule) -> str:
    mode = store_of(graph).mode
    only = "train" if mode.training else "eval"
    return only if mode.locked else "train and eval"


def renamed(recipe: Recipe, taken: set[str]) -> Recipe:
    """The recipe with a free name in the place of "default", which a `.pt2` may use already."""
    if "default" not in taken or "default" not in recipe:
        return recipe
    return Recipe({("new" if name == "default" else name): config for name, config in recipe.items()})


def step(report: Report, after: int) -> Step:
    before = after - sum(report.op_difference.values())
    return Step(report.name, report.changed, report.seconds, before, after, report.op_difference)
