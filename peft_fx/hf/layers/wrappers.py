"""`ModulesToSaveWrapper` and its like: modules for which an adapter has a copy, or rows, of its own."""

from __future__ import annotations

from torch import nn

from .layer import layer_of
from .plain import plain
from .verbs import Verbs
from .view import viewed


@viewed
class AuxiliaryTrainingWrapper(Verbs):
    """A module with numbers of an adapter's in place of its own."""

    @property
    def original_module(self) -> nn.Module:
        """The module without adapters."""
        return plain(self)

    @property
    def active_adapters(self) -> list[str]:
        layer = layer_of(self)
        return [name for name in layer.tuner.active_adapters if name in layer.saved]

    @property
    def active_adapter(self) -> list[str]:
        layer = layer_of(self)
        return [name for name in layer.tuner.active_adapters if name in layer.saved]

    @property
    def disable_adapters(self) -> bool:
        return not layer_of(self).tuner.enabled


class ModulesToSaveWrapper(AuxiliaryTrainingWrapper):
    """A module that some adapter trains whole."""

    pefts = ("peft.utils.other", "ModulesToSaveWrapper")


class TrainableTokensWrapper(AuxiliaryTrainingWrapper):
    """An embedding, or a head, some of whose rows some adapter trains."""

    pefts = ("peft.utils.other", "TrainableTokensWrapper")
