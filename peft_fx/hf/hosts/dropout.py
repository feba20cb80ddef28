"""Adapters' dropout as modules: tools that set `p` of every nn.Dropout in a model, as TRL's trainers do, find them there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from torch import nn

from ...methods import get_method

if TYPE_CHECKING:
    from ..model.tuner import Tuner


class InputDropout(nn.Dropout):
    """An adapter's dropout on the inputs of its updates. It does not run: its `p` is read and set in the adapter's config.

    tuner: holds it.
    """

    tuner: Tuner

    def __init__(self, tuner: Tuner, adapter: str, field: str):
        nn.Module.__init__(self)
        self.inplace, self.adapter, self.field = False, adapter, field
        self.__dict__["tuner"] = tuner  # holds this module: no child

    @property
    def p(self) -> float:
        return getattr(self.tuner.backend.state.recipe[self.adapter].config, self.field)

    @p.setter
    def p(self, value: float) -> None:
        self.tuner.backend.configure(self.adapter, **{self.field: float(value)})
        self.tuner.refresh((self.adapter,))


def dropouts(tuner: Tuner, there: Iterable[InputDropout]) -> Iterator[InputDropout]:
    """One for each adapter that drops out, or has one already: what was set to 0 can be set again."""
    known = {d.adapter: d for d in there}
    for adapter, resident in tuner.backend.state.recipe.items():
        field = get_method(resident.config.peft_type).drops
        if field and (adapter in known or getattr(resident.config, field)):
            yield known.get(adapter) or InputDropout(tuner, adapter, field)
