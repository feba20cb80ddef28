"""Precision of a model's parameters before training: quantised bases, mixed precision. PEFT's names."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from ...methods.base import HALF
from ...storage.loaded import brings_halves, holds_packed, is_loaded_packed

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict | None = None,
    auto_clear_cache: bool = True,
) -> nn.Module:
    """Freezes a model; its 16-bit parameters become float32, but for packed ones. Returns the same model.

    A quantised model also gets gradient checkpointing, and inputs that require grad where checkpoints are reentrant: with
    frozen embeddings they would cut the gradients off otherwise. auto_clear_cache: hand freed memory back to the device.
    """
    model.requires_grad_(False)
    own_types = brings_halves(model)
    if not own_types:
        for parameter in model.parameters():
            if parameter.dtype in HALF and not holds_packed(parameter):
                parameter.data = parameter.data.float()  # ties and names stay
        if auto_clear_cache and torch.accelerator.is_available():
            torch.accelerator.empty_cache()
    packed = own_types or is_loaded_packed(model)
    if packed and use_gradient_checkpointing:
        options = gradient_checkpointing_kwargs or {}
        if options.get("use_reentrant", True):
            require_input_grads(model)
        cast("PreTrainedModel", model).gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    return model


def require_input_grads(model: nn.Module) -> None:
    """What comes out of the embeddings requires grad."""
    known = cast("PreTrainedModel", model)
    if hasattr(model, "enable_input_require_grads"):
        known.enable_input_require_grads()
    else:
        known.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_(True))


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Frozen parameters become `dtype`, trained ones float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)
