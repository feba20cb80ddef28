"""Weights in memory: those of an adapter's files, those of the model around which a PeftModel is. PEFT's names."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from torch import nn

from ..files.read import CONFIG, PICKLE, TENSORS, local_folder, read_tensors
from ..planning.plan import PREFIX, PREFIX_SHARED
from .tuner import tuner_of


def infer_device() -> str:
    """The accelerator of this machine, else "cpu"."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if found is None else found.type


def load_peft_weights(model_id, device: str | torch.device | None = None, key_mapping: dict[str, str] | None = None,
                      subfolder: str | None = None, **hub) -> dict[str, torch.Tensor]:  # fmt: skip
    """File key -> tensor of an adapter's folder, or of a Hub repository, on `device`, by default the accelerator.

    key_mapping: regex -> replacement for module paths, the first that matches. hub: what `huggingface_hub` takes (revision,
    token, cache_dir, ...), whose errors are its own then. Raises AdapterFileError.
    """
    if hub and not Path(model_id).is_dir():
        model_id = snapshot_download(model_id, allow_patterns=[f"*{n}" for n in (CONFIG, TENSORS, PICKLE)], **hub)
    folder = local_folder(model_id)
    tensors = read_tensors(folder / subfolder if subfolder else folder)
    device = infer_device() if device is None else device
    return {renamed(key, key_mapping or {}): tensor.to(device) for key, tensor in tensors.items()}


def renamed(key: str, mapping: dict[str, str]) -> str:
    prefix = next((p for p in (PREFIX, PREFIX_SHARED) if key.startswith(p)), "")
    path = key[len(prefix) :]
    return prefix + next((re.sub(old, new, path) for old, new in mapping.items() if re.search(old, path)), path)


def get_base_model_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict of the model itself, whose modules and names no adapter changes."""
    return tuner_of(model).model.state_dict()


def set_base_model_state_dict(model: nn.Module, state_dict: dict[str, torch.Tensor], strict: bool = True):
    """Writes it; returns missing and unexpected keys, for which strict raises RuntimeError.

    Raises ValueError while adapters are merged: unmerging would put the weights from before back.
    """
    tuner = tuner_of(model)
    if tuner.merged_adapters:
        raise ValueError(f"{', '.join(tuner.merged_adapters)} merged into the weights: call unmerge_adapter() first")
    return tuner.model.load_state_dict(state_dict, strict=strict)
