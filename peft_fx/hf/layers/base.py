"""`BaseTunerLayer`: what an adapted module is besides what it was, under PEFT's names; views of the tuner's state."""

from __future__ import annotations

import torch
from torch import nn

from .layer import layer_of
from .plain import plain
from .verbs import Verbs
from .view import viewed


@viewed
class BaseTunerLayer(Verbs):
    """A module with adapters on it."""

    def get_base_layer(self) -> nn.Module:
        """The module as it was: its own class, the same tensors, calls without adapters."""
        return plain(self)

    @property
    def base_layer(self) -> nn.Module:
        return plain(self)

    @property
    def active_adapters(self) -> list[str]:
        return list(layer_of(self).tuner.chosen)

    @property
    def active_adapter(self) -> list[str]:
        return list(layer_of(self).tuner.chosen)

    @property
    def merged_adapters(self) -> list[str]:
        """Those of the merged adapters that are on this module."""
        layer = layer_of(self)
        return [name for name in layer.tuner.merged_adapters if name in layer.placed]

    @property
    def merged(self) -> bool:
        return bool(layer_of(self).tuner.merged_adapters)

    @property
    def disable_adapters(self) -> bool:
        return not layer_of(self).tuner.enabled

    def get_base_weight(self) -> torch.Tensor:
        return plain(self).weight.data
