"""PEFT's free functions over a `PeftModel`."""

from __future__ import annotations

import torch
from torch.nn.modules.module import _IncompatibleKeys

from ..recipe import as_config
from ..verbs.adapters import adapter_files
from ..verbs.hotswap import SwapReport
from .model import DEFAULT, PeftModel, tuner_of
from .status import TunerLayerStatus, TunerModelStatus


def get_peft_model_state_dict(model: PeftModel, state_dict=None, adapter_name: str = DEFAULT, unwrap_compiled: bool = False,
                              save_embedding_layers="auto") -> dict[str, torch.Tensor]:  # fmt: skip
    """File key -> tensor of one adapter; the tensors are the model's own. state_dict is not read: it has no more than they."""
    return adapter_files(tuner_of(model).backend.adapters, adapter_name)[1]


def set_peft_model_state_dict(model: PeftModel, peft_model_state_dict: dict, adapter_name: str = DEFAULT,
                              ignore_mismatched_sizes: bool = False, low_cpu_mem_usage: bool = False):  # fmt: skip
    """Writes file key -> tensor into a resident adapter, in place. Raises AdapterFileError if a key is missing or left over."""
    hotswap_adapter_from_state_dict(model, peft_model_state_dict, adapter_name, model.peft_config[adapter_name])
    return _IncompatibleKeys([], [])


def hotswap_adapter(model: PeftModel, model_name_or_path, adapter_name: str, torch_device: str | None = None,
                    **kwargs) -> SwapReport:  # fmt: skip
    """Another adapter's numbers, of any method that the resident one has, in its place: nothing is compiled again."""
    return tuner_of(model).backend.hotswap(model_name_or_path, adapter_name)


def hotswap_adapter_from_state_dict(model: PeftModel, state_dict: dict, adapter_name: str, config,
                                    parameter_prefix: str = "") -> SwapReport:  # fmt: skip
    """`hotswap_adapter` from memory. Scales follow the config, its patterns included."""
    return tuner_of(model).backend.hotswap((as_config(config), dict(state_dict)), adapter_name)


def get_layer_status(model: PeftModel) -> list[TunerLayerStatus]:
    """A record per adapted module. Raises TypeError for a model that is no PeftModel."""
    tuner_of(model)
    return model.get_layer_status()


def get_model_status(model: PeftModel) -> TunerModelStatus:
    tuner_of(model)
    return model.get_model_status()
