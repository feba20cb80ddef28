"""Merging asked for at one module."""

from __future__ import annotations

from ...engine.inplace import fold_again
from .layer import Layer


def merge(layer: Layer, safe_merge: bool, adapter_names: list[str] | None) -> None:
    """All modules' adapters are merged together. Tools that scale each module just before it is merged find it folded anew."""
    tuner = layer.tuner
    names = list(tuner.active_adapters if adapter_names is None else adapter_names)
    if isinstance(adapter_names, str) or any(name not in tuner.merged_adapters for name in names):
        tuner.merge_adapter(adapter_names, safe_merge)
    elif layer.rescaled:
        refold(layer, safe_merge)
        layer.rescaled = False


def unmerge(layer: Layer) -> None:
    if layer.tuner.merged_adapters:
        layer.tuner.unmerge_adapter()


def refold(layer: Layer, check_finite: bool) -> None:
    """The module's merged weights from what they were before, with the scales of now."""
    tuner = layer.tuner
    chosen = [p for name in tuner.merged_adapters for p in layer.placed.get(name, ())]
    fold_again(tuner.backend.adapters, chosen, check_finite)
