"""What `inspect` shows, gathered once as plain data; the formats are functions over it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from torch import fx

from ..errors import RecipeError
from ..files.read import local_folder, read_config
from ..methods import INTERNAL, METHODS
from ..passes.core.base import Report, op_counts, settings
from ..recipe import READERS, Recipe, as_recipe
from ..store.state import state_of
from ..store.tensors import ROOT
from ..suggestions import did_you_mean
from ..verbs.explain import Row, explain, possible_targets
from ..verbs.preview import preview
from .model import open_model
from .nodes import View, view_of
from .terminal import working


@dataclass(frozen=True)
class Model:
    """weights: False for a model built from its config alone. mode: "train and eval", or the one mode it has."""

    source: str
    name: str
    parameters: int
    dtypes: tuple[str, ...]
    mode: str
    weights: bool


@dataclass(frozen=True)
class Step:
    """One pass: places changed, operator calls before and after it, and which of them differ."""

    name: str
    changed: int
    seconds: float
    before: int
    after: int
    difference: dict[str, int]


@dataclass(frozen=True)
class Inspection:
    """rows: targets, one each. nodes: of the base graph and of the adapted one. view: the graph, or what --target chose."""

    model: Model
    rows: tuple[Row, ...]
    steps: tuple[Step, ...]
    nodes: tuple[int, int]
    view: View

    @property
    def adapted(self) -> bool:
        """False where the rows list what could be adapted."""
        return not any(r.status == "possible" for r in self.rows)

    @property
    def added(self) -> int:
        """Trained elements besides the model's own; those of merged adapters are in it."""
        return sum(r.parameters for r in self.rows if r.status != "merged")

    def count(self, *statuses: str) -> int:
        return sum(r.status in statuses for r in self.rows)


def gather(source: str, recipe: str | None, adapter: str | None, target: str | None) -> Inspection:
    """Opens, plans, derives. Raises PeftFxError."""
    wanted = recipe_of(recipe, adapter)  # before the model, which takes longer
    reports: list[tuple[Report, fx.GraphModule, int]] = []

    def keep(report: Report, gm: fx.GraphModule) -> None:
        reports.append((report, gm, sum(op_counts(gm).values())))

    with settings(on_report=keep):
        opened = open_model(source)
        base = shown = opened.graph
        rows = explain(base).rows
        if wanted is not None:
            with working("splicing"):
                wanted = renamed(wanted, set(state_of(base).recipe))
                shown = preview(base, wanted)
                rows += explain(shown, wanted).rows
    rows = rows or possible_targets(base).rows
    state = state_of(shown)
    steps = tuple(step(report, after) for report, gm, after in reports if gm is base or gm is shown)
    nodes = (len(state.base.graph.nodes), len(shown.graph.nodes))
    view = view_of(state.base.graph, shown.graph, target, [r.target for r in rows], state.table)
    return Inspection(model_of(source, opened.graph, opened.weights), rows, steps, nodes, view)


def recipe_of(recipe: str | None, adapter: str | None) -> Recipe | None:
    """The recipe of --recipe (file, JSON, or the name of a method) or --adapter (a folder of PEFT's). Raises PeftFxError."""
    if adapter is not None:
        return as_recipe(read_config(local_folder(Path(adapter).expanduser())))
    if recipe is None:
        return None
    if recipe.lstrip().startswith("{"):
        return as_recipe(parsed(recipe))
    public = METHODS.keys() - INTERNAL
    path = Path(recipe).expanduser()
    if recipe.upper() in public and not path.exists():
        return as_recipe({"peft_type": recipe.upper()})
    if not path.exists() and path.suffix not in READERS:
        hint = did_you_mean(recipe, [name.lower() for name in sorted(public)])
        raise RecipeError(
            f"--recipe {recipe}: neither a file, nor JSON, nor a method, which peft-fx methods lists{hint}"
        )
    return as_recipe(path)


def parsed(text: str) -> dict:
    try:
        return READERS[".json"](text)
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"--recipe: not valid JSON: {error}") from error


def renamed(recipe: Recipe, taken: set[str]) -> Recipe:
    """The recipe with a free name in the place of "default", which a `.pt2` may use already."""
    if "default" not in taken or "default" not in recipe:
        return recipe
    return Recipe({("new" if name == "default" else name): config for name, config in recipe.items()})


def model_of(source: str, graph: fx.GraphModule, weights: bool) -> Model:
    base = {p for name, p in graph.named_parameters() if not name.startswith(f"{ROOT}.")}
    dtypes = Counter(str(p.dtype).removeprefix("torch.") for p in base)
    mode = graph.peft_fx.mode
    only = "train" if mode.training else "eval"
    return Model(
        source=source,
        name=state_of(graph).table.model_class or type(graph).__name__,
        parameters=sum(p.numel() for p in base),
        dtypes=tuple(d for d, _ in dtypes.most_common()),
        mode=only if mode.locked else "train and eval",
        weights=weights,
    )


def step(report: Report, after: int) -> Step:
    before = after - sum(report.op_difference.values())
    return Step(report.name, report.changed, report.seconds, before, after, report.op_difference)
