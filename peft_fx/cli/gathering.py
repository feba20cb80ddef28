"""What `inspect` is asked for: from the module table alone where that has the answer, else from a capture."""

from __future__ import annotations

from ..planning.possible import possible_targets, undecided
from ..verbs.rows import possible_row
from .facts import Inspection, model_of, recipe_of
from .model import Built, open_model


def gather(
    source: str, recipe: str | None, adapter: str | None, target: str | None, traced: bool = False
) -> Inspection:
    """Opens, plans, derives. traced: the whole graph is wanted. Raises PeftFxError.

    A model is captured only where its module table does not have the answer.
    """
    wanted = recipe_of(recipe, adapter)  # before the model, which takes longer
    opened = open_model(source)
    listed = wanted is None and target is None and not traced
    if listed and isinstance(opened, Built) and not undecided(opened.table):
        rows = tuple(possible_row(t) for t in possible_targets(opened.table) if t.kind != "norm")
        return Inspection(model_of(source, opened.table, opened.model, opened.weights), rows)
    from .graphs import inspected

    return inspected(source, opened, wanted, target)
