"""diffusers' `fuse_lora` on a whole model: layer after layer, as its own does it, models would be merged in part."""

from __future__ import annotations

from torch import nn

from ..compat.helpers import scales
from ..model.injection import injected
from ..model.tensors import adapters_of


def fuse(
    model: nn.Module, lora_scale: float = 1.0, safe_fusing: bool = False, adapter_names: list[str] | None = None
) -> None:
    """Merges adapters, None: those that act, whose updates count lora_scale times from now on, also when they are unmerged."""
    tuner = injected(model)
    acting = set(tuner.active_adapters) if lora_scale != 1.0 else ()
    before = {s.tensor: s.tensor.clone() for s in scales(model) if s.placement.adapter in acting}
    sharing = adapters_of(model).peft_fx.sharing
    sharing.put({t: t * lora_scale for t in before})
    try:
        tuner.merge_adapter(adapter_names, safe_merge=safe_fusing)
    except BaseException:
        sharing.put(before)
        raise
