"""Weights in memory: those of an adapter's files, those of the model around which a PeftModel is. PEFT's names."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys

from ...atomic import StrPath
from ...files.keys import mapped
from ...files.read import located, read_tensors
from .tuner import PREFIX, tuner_of


def infer_device() -> str:
    """The accelerator of this machine, else "cpu"."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if found is None else found.type


def load_peft_weights(model_id: StrPath, device: str | torch.device | None = None,
                      key_mapping: dict[str, str] | None = None, subfolder: str | None = None,
                      **hub: Any) -> dict[str, torch.Tensor]:  # fmt: skip
    """File key -> tensor of an adapter's folder, or of a Hub repository, on `device`, by default the accelerator.

    key_mapping: regex -> replacement for module paths, the first that matches. hub: what `snapshot_download` takes (revision,
    token, cache_dir, ...). Raises AdapterFileError.
    """
    tensors = mapped(read_tensors(located(model_id, subfolder, **hub)), key_mapping)
    device = infer_device() if device is None else device
    return {key: tensor.to(device) for key, tensor in tensors.items()}


def get_base_model_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict of the model itself, whose modules and names no adapter changes."""
    return {k: t for k, t in tuner_of(model).model.state_dict().items() if not k.startswith(PREFIX)}


def set_base_model_state_dict(
    model: nn.Module, state_dict: dict[str, torch.Tensor], strict: bool = True
) -> _IncompatibleKeys:
    """Writes it; returns missing and unexpected keys, for which strict raises RuntimeError.

    Raises ValueError while adapters are merged: unmerging would put the weights from before back.
    """
    tuner = tuner_of(model)
    if tuner.merged_adapters:
        raise ValueError(f"{', '.join(tuner.merged_adapters)} merged into the weights: call unmerge_adapter() first")
    found = tuner.model.load_state_dict(state_dict, strict=False)
    missing = [k for k in found.missing_keys if not k.startswith(PREFIX)]
    if strict and (missing or found.unexpected_keys):
        raise RuntimeError(
            f"the state dict is not this {type(tuner.model).__name__}'s: it lacks {', '.join(missing) or 'nothing'}, and has "
            f"{', '.join(found.unexpected_keys) or 'nothing'} besides; strict=False takes what fits"
        )
    return _IncompatibleKeys(missing, found.unexpected_keys)
