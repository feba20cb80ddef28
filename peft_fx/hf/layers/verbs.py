"""What is done through one adapted module: which adapters act, for the whole model, and how much they count on this module."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from ...errors import MergeError
from ...planning.plan import Placement
from .layer import Layer, layer_of
from .view import viewed

SCALE = "scaling"


@viewed
class Verbs:
    """Adapters act, merge and go in a model, not in a module: one module's call does it, the others' find it done."""

    def set_adapter(self, adapter_names: str | Iterable[str], inference_mode: bool = False) -> None:
        """The adapters that act, and train unless inference_mode."""
        layer = layer_of(self)
        names = (adapter_names,) if isinstance(adapter_names, str) else tuple(adapter_names)
        trained = [t.requires_grad for t in parameters(layer, names)]
        if tuple(layer.tuner.active_adapters) != names or inference_mode in trained:
            layer.tuner.set_adapter(names, inference_mode)

    def enable_adapters(self, enabled: bool) -> None:
        tuner = layer_of(self).tuner
        if tuner.enabled != enabled:
            (tuner.enable_adapter_layers if enabled else tuner.disable_adapter_layers)()

    def delete_adapter(self, adapter_name: str) -> None:
        tuner = layer_of(self).tuner
        if adapter_name in tuner.peft_config:
            tuner.delete_adapter(adapter_name)

    def set_scale(self, adapter: str, scale: float) -> None:
        """This many times what the config says."""
        layer_of(self).put({t: scale * fresh(spec, t) for t, spec in scales(layer_of(self), (adapter,))})

    def scale_layer(self, scale: float) -> None:
        """What acts counts this many times more."""
        layer = layer_of(self)
        layer.put({t: t * scale for t, _ in scales(layer, layer.tuner.active_adapters)})

    def unscale_layer(self, scale: float | None = None) -> None:
        """Takes a `scale_layer` back; None: all of them."""
        layer = layer_of(self)
        found = scales(layer, layer.tuner.active_adapters)
        layer.put({t: fresh(spec, t) if scale is None else t / scale for t, spec in found})

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused but where the model has it merged: a model merged in part is in no state that we have."""
        layer = layer_of(self)
        names = adapter_names or layer.tuner.active_adapters
        if not set(names) <= set(layer.tuner.merged_adapters):
            raise MergeError(
                f"{layer.path}: one module's adapters are not merged on their own: use merge_adapter of the model, or of "
                "model.base_model"
            )

    def unmerge(self) -> None:
        tuner = layer_of(self).tuner
        if tuner.merged_adapters:
            tuner.unmerge_adapter()


def parameters(layer: Layer, names: Iterable[str]) -> Iterator[torch.Tensor]:
    for p in (p for name in names for p in layer.placed.get(name, ())):
        for name, spec in p.tensors.items():
            if spec.trainable:
                yield getattr(*layer.place(p, name))


def scales(layer: Layer, names: Iterable[str]) -> list[tuple[torch.Tensor, object]]:
    """What the updates of these adapters on the module are multiplied by, with how it is made from the config."""
    placed: Iterator[Placement] = (p for name in names for p in layer.placed.get(name, ()) if SCALE in p.tensors)
    return [(getattr(*layer.place(p, SCALE)), p.tensors[SCALE]) for p in placed]


def fresh(spec, like: torch.Tensor) -> torch.Tensor:
    new = torch.empty_like(like)
    spec.init(new, None)
    return new
