"""`BaseTunerLayer`: what an adapted module is besides what it was, under PEFT's names; views of the tuner's state."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from .acting import Acting
from .containers import containers
from .fields import names
from .layer import layer_of
from .merging import merge, unmerge
from .plain import plain
from .scales import SCALE, initial, scale_of, scaled, write_scale
from .view import viewed


@viewed
class BaseTunerLayer(Acting):
    """A module with adapters on it."""

    def get_base_layer(self) -> nn.Module:
        """The module as it was: its own class, the same tensors, calls without adapters."""
        return plain(self)

    @property
    def base_layer(self) -> nn.Module:
        return plain(self)

    @property
    def adapter_layer_names(self) -> tuple[str, ...]:
        """Attributes with the adapters' trained tensors."""
        return containers(layer_of(self), True)

    @property
    def other_param_names(self) -> tuple[str, ...]:
        """Attributes with their other tensors, and with what their configs say."""
        layer = layer_of(self)
        fields = [name for p in (p for n in layer.placed for p in layer.updates(n)) for name in names(type(p.config))]
        return tuple(dict.fromkeys((*fields, *[SCALE] * bool(self.scaling), *containers(layer, False))))

    def get_base_weight(self) -> torch.Tensor:
        return cast(torch.Tensor, plain(self).weight).data

    @property
    def merged(self) -> bool:
        return bool(self.merged_adapters)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """`Tuner.merge_adapter`: on all modules; again on one whose scales have changed since."""
        merge(layer_of(self), safe_merge, adapter_names)

    def unmerge(self) -> None:
        """`Tuner.unmerge_adapter`: on all modules."""
        unmerge(layer_of(self))

    # Scales, of this module alone

    def set_scale(self, adapter: str, scale: float) -> None:
        """The adapter's scale becomes `scale` times what its config says. Nothing happens where it is not on this module."""
        for p in scaled(layer_of(self), [adapter]):
            write_scale(layer_of(self), p, scale * initial(p.tensors[SCALE]))

    def scale_layer(self, scale: float) -> None:
        """The scales of the acting adapters become `scale` times what they are."""
        layer = layer_of(self)
        for p in scaled(layer, self.active_adapters) if scale != 1 else ():
            write_scale(layer, p, scale * scale_of(layer, p))

    def unscale_layer(self, scale: float | None = None) -> None:
        """Undoes `scale_layer(scale)`; None: they become what the configs say."""
        layer = layer_of(self)
        for p in scaled(layer, self.active_adapters):
            write_scale(layer, p, initial(p.tensors[SCALE]) if scale is None else scale_of(layer, p) / scale)
