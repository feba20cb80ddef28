"""What `inspect` is asked for: from the module table alone where that has the answer, else from a capture."""

from __future__ import annotations

from ..planning.possible import possible_targets, undecided
from ..verbs.rows import possible_row
from .facts import Inspection, model_of, recipe_of
from .model import open_model


def gather(
    source: str, recipe: str | None, adapter: str | None, target: str | None, traced: bool = False
) -> Inspection:
    """Opens, plans, derives. traced: the whole graph is wanted. Raises PeftFxError.

    A model is captured only where its module table does not have the answer.
    """
    wanted = recipe_of(recipe, adapter)  # before the model, which takes longer
    opened = open_model(source)
    table = None if traced or wanted is not None or target is not None else opened.table
    if table is None or undecided(table):
        from .graphs import inspected

        return inspected(source, opened, wanted, target)
    rows = tuple(possible_row(t) for t in possible_targets(table) if t.kind != "norm")
    return Inspection(model_of(source, table, opened.model, opened.weights), rows)
