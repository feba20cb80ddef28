"""Precision of a model's parameters before training: quantised bases, mixed precision. PEFT's names."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from ...methods.base import HALF

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# what transformers calls quantisations that bring their own 16-bit parameters: those stay as they are
LEFT_ALONE = frozenset({"gptq", "aqlm", "eetq", "torchao", "hqq"})


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
    quantized = str(getattr(model, "quantization_method", ""))
    own_types = quantized in LEFT_ALONE or getattr(model, "hqq_quantized", False)
    if not own_types:
        for parameter in model.parameters():
            if parameter.dtype in HALF and type(parameter).__name__ != "Params4bit":  # bitsandbytes packs numbers in it
                parameter.data = parameter.data.float()  # ties and names stay
        if auto_clear_cache and torch.accelerator.is_available():
            torch.accelerator.empty_cache()
    packed = own_types or any(getattr(model, f"is_loaded_in_{bits}bit", False) for bits in (4, 8))
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
