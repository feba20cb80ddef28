"""Which adapters act, asked and set at one adapted module. The adapters of a model act, train and merge together: what a call
here changes, it changes for all modules, so that a loop over them, as tools have it, ends where its first step leads."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn

from .layer import Layer, layer_of
from .view import viewed

if TYPE_CHECKING:
    Mixed = nn.Module  # what it is mixed into
else:
    Mixed = object


@viewed
class Acting(Mixed):
    """What layers and wrappers have in common."""

    @property
    def active_adapters(self) -> list[str]:
        return list(layer_of(self).tuner.active_adapters)

    @property
    def active_adapter(self) -> list[str]:
        return list(layer_of(self).tuner.active_adapters)

    @property
    def disable_adapters(self) -> bool:
        return not layer_of(self).tuner.enabled

    @property
    def merged_adapters(self) -> list[str]:
        """Those of the merged adapters that are on this module."""
        layer = layer_of(self)
        return [name for name in layer.tuner.merged_adapters if name in layer.names]

    def set_adapter(self, adapter_names: str | Iterable[str], inference_mode: bool = False) -> None:
        """`Tuner.set_adapter`: for all modules."""
        layer = layer_of(self)
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if names == list(layer.tuner.active_adapters) and not layer.tuner.merged_adapters:
            train(layer, names, not inference_mode)
        else:
            layer.tuner.set_adapter(names, inference_mode)

    def enable_adapters(self, enabled: bool) -> None:
        """Whether adapters act, in all modules; those that do are trainable."""
        layer = layer_of(self)
        if enabled != layer.tuner.enabled:
            layer.tuner.enable_adapter_layers() if enabled else layer.tuner.disable_adapter_layers()
            layer = layer_of(self)
        train(layer, layer.tuner.active_adapters, enabled)

    def set_requires_grad(self, adapter_names: str | Iterable[str], requires_grad: bool = True) -> None:
        """Of the adapters' parameters on this module."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        layer = layer_of(self)
        layer.tuner.known(names)
        for parameter in parameters(layer, trainable(layer, names) if requires_grad else names):
            parameter.requires_grad_(requires_grad)

    def delete_adapter(self, adapter_name: str, new_active_adapters: list[str] | None = None) -> None:
        """`Tuner.delete_adapter`: from all modules. Nothing happens where this one does not have it, or not any more."""
        layer = layer_of(self)
        if adapter_name in layer.names and adapter_name in layer.tuner.peft_config:
            layer.tuner.delete_adapter(adapter_name)
            if new_active_adapters and list(new_active_adapters) != list(layer.tuner.active_adapters):
                layer.tuner.set_adapter(new_active_adapters)


def train(layer: Layer, names: Iterable[str], requires_grad: bool) -> None:
    """These adapters' parameters on the module require grad or not, those of others do not."""
    chosen = {id(p) for p in parameters(layer, trainable(layer, names) if requires_grad else ())}
    for parameter in parameters(layer, layer.names):
        parameter.requires_grad_(id(parameter) in chosen)


def trainable(layer: Layer, names: Iterable[str]) -> list[str]:
    """Those with numbers that can be trained on; warns of any other."""
    return [name for name in names if layer.tuner.can_train(name)]


def parameters(layer: Layer, names: Iterable[str]) -> list[nn.Parameter]:
    held = [layer.tensor(p, name) for n in names for p in layer.inside(n) for name in p.tensors]
    return [tensor for tensor in held if isinstance(tensor, nn.Parameter)]
