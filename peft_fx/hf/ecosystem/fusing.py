"""diffusers' `fuse_lora` on a whole model: layer after layer, as its own does it, there would be models that are merged in part."""

from __future__ import annotations

from torch import nn

from ..compat.helpers import scales, write
from ..model.injection import injected


def fuse(
    model: nn.Module, lora_scale: float = 1.0, safe_fusing: bool = False, adapter_names: list[str] | None = None
) -> None:
    """Merges adapters, None: those that act, whose updates count lora_scale times from now on, also when they are unmerged."""
    tuner = injected(model)
    acting = set(tuner.active_adapters) if lora_scale != 1.0 else ()
    scaled = [s.tensor for s in scales(model) if s.placement.adapter in acting]
    before = [s.clone() for s in scaled]
    write(model, scaled, [s * lora_scale for s in scaled])
    try:
        tuner.merge_adapter(adapter_names, safe_merge=safe_fusing)
    except BaseException:
        write(model, scaled, before)
        raise
