"""`ModulesToSaveWrapper` and its like: modules for which an adapter has a copy, or rows, of its own."""

from __future__ import annotations

from torch import nn

from .acting import Acting
from .containers import fixed_dict
from .layer import Layer, layer_of
from .plain import plain, with_tensors
from .view import viewed


@viewed
class AuxiliaryTrainingWrapper(Acting):
    """A module with numbers of an adapter's in place of its own."""

    @property
    def active_adapters(self) -> list[str]:
        """Those of the active adapters that are on this module; any other leaves it as it is."""
        return list(layer_of(self).acting)

    @property
    def active_adapter(self) -> list[str]:
        return list(layer_of(self).acting)

    @property
    def original_module(self) -> nn.Module:
        """The module without adapters."""
        return plain(self)

    @property
    def other_param_names(self) -> tuple[str, ...]:
        return ()


@viewed
class ModulesToSaveWrapper(AuxiliaryTrainingWrapper):
    """A module that some adapter trains whole."""

    pefts = ("peft.utils.other", "ModulesToSaveWrapper")

    @property
    def modules_to_save(self) -> nn.ModuleDict:
        """Adapter -> the module with the adapter's numbers, which are its own Parameters."""
        layer = layer_of(self)
        return fixed_dict(nn.ModuleDict, {name: with_tensors(self, owned(layer, name)) for name in layer.saved})

    @property
    def adapter_layer_names(self) -> tuple[str, ...]:
        return ("modules_to_save",)


@viewed
class TrainableTokensWrapper(AuxiliaryTrainingWrapper):
    """An embedding, or a head, some of whose rows some adapter trains."""

    pefts = ("peft.utils.other", "TrainableTokensWrapper")

    @property
    def trainable_tokens_delta(self) -> nn.ParameterDict:
        """Adapter -> its rows."""
        layer = layer_of(self)
        found = {p.adapter: p for n in layer.placed for p in layer.substitutes(n) if "ids" in p.tensors}
        return fixed_dict(nn.ParameterDict, {n: layer.tensor(p, "trainable_tokens_delta") for n, p in found.items()})

    @property
    def adapter_layer_names(self) -> tuple[str, ...]:
        return ("trainable_tokens_delta",)


def owned(layer: Layer, adapter: str) -> dict[str, tuple]:
    """Name below the module -> the adapter's tensor that stands for it, and where that is."""
    start = len(layer.path) + 1
    return {p.target.name[start:]: (layer.tensor(p, "weight"), layer.place(p, "weight")) for p in layer.inside(adapter)}
