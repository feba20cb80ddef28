"""Merging asked for at one module."""

from __future__ import annotations

from ...engine.merging import by_target, folded
from ...store.tensors import get_tensor
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
    gm = tuner.backend.adapters
    targets = {name for p in chosen for name in (p.target.name, p.target.bias_name)}
    weights = [t for name in targets if (t := get_tensor(tuner.model, name)) is not None]
    with gm.peft_fx.sharing.writing(weights):
        tuner.replaced.undo(targets)
        results = {}
        for group in by_target(chosen).values():
            results |= folded(gm, group, check_finite)[0]
        tuner.replaced.write(results)
