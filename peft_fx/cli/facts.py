"""What `inspect` shows, gathered once as plain data; the formats are functions over it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ..errors import RecipeError
from ..files.read import local_folder, read_config
from ..methods import INTERNAL, METHODS
from ..recipe import READERS, Recipe, as_recipe
from ..store.tensors import ROOT
from ..suggestions import did_you_mean
from ..target import ModuleTable
from ..verbs.rows import Row
from .nodes import View


@dataclass(frozen=True)
class Model:
    """weights: False for a model built from its config alone. mode: "train and eval", or the one mode that the graph has; None
    without a graph."""

    source: str
    name: str
    parameters: int
    dtypes: tuple[str, ...]
    mode: str | None
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
    """rows: targets, one each. nodes: of the base graph and of the adapted one; None where no graph was needed. view: the
    graph, or what --target chose."""

    model: Model
    rows: tuple[Row, ...]
    steps: tuple[Step, ...] = ()
    nodes: tuple[int, int] | None = None
    view: View = View()

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


def model_of(source: str, table: ModuleTable, model: nn.Module, weights: bool, mode: str | None = None) -> Model:
    base = {p for name, p in model.named_parameters() if not name.startswith(f"{ROOT}.")}
    dtypes = Counter(str(p.dtype).removeprefix("torch.") for p in base)
    return Model(
        source=source,
        name=table.model_class or type(model).__name__,
        parameters=sum(p.numel() for p in base),
        dtypes=tuple(d for d, _ in dtypes.most_common()),
        mode=mode,
        weights=weights,
    )


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
