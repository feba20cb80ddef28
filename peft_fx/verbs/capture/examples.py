"""Example inputs for Hugging Face models, built from the config, so that `capture(model)` needs none.

Sizes are only examples: batch and sequence become symbols. They are kept apart from one another and from 0 and 1, which
export would specialise on.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...errors import CaptureError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH, SEQUENCE, TARGET_SEQUENCE = 2, 7, 5


def is_hugging_face(model: nn.Module) -> bool:
    return hasattr(model, "config") and hasattr(model, "main_input_name")


def refuse_no_call(model: nn.Module, args: Any, kwargs: Any) -> None:
    """Raises CaptureError for example inputs with which the model cannot be called."""
    if not isinstance(args, (tuple, list)):
        remedy = "by name they are kwargs={...}" if isinstance(args, dict) else "one input is args=(x,)"
        raise CaptureError(f"args: expected a tuple of example inputs, got {type(args).__name__}: {remedy}")
    signature = inspect.signature(model.forward)
    try:
        signature.bind(*args, **(kwargs or {}))
    except TypeError as error:
        names = ", ".join(signature.parameters)
        raise CaptureError(f"{type(model).__name__}.forward({names}) cannot be called with these: {error}") from error


def example_inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Keyword arguments for one forward call. Raises CaptureError for models whose inputs it cannot build."""
    parameters = inspect.signature(model.forward).parameters
    names = {model.main_input_name}
    if "input_ids" in parameters and "pixel_values" in parameters:  # CLIP and the like take both
        names |= {"input_ids", "pixel_values"}
    inputs = {name: build(name, model) for name in sorted(names)}
    if "input_ids" in names and "attention_mask" in parameters:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if model.config.is_encoder_decoder and "decoder_input_ids" in parameters:
        inputs["decoder_input_ids"] = ids(model.config, TARGET_SEQUENCE)
    device = next(model.parameters()).device
    return {k: v.to(device) for k, v in inputs.items()}


def build(name: str, model: PreTrainedModel) -> torch.Tensor:
    if name not in BUILDERS:
        raise CaptureError(
            f"{type(model).__name__} takes {name!r}, for which no example is known: "
            f"pass kwargs={{{name!r}: ...}} to capture (known: {', '.join(BUILDERS)})"
        )
    return BUILDERS[name](model)


def ids(config: Any, length: int) -> torch.Tensor:
    vocabulary = config.get_text_config().vocab_size
    return torch.arange(BATCH * length).reshape(BATCH, length) % max(vocabulary - 3, 1) + min(2, vocabulary - 1)


def images(model: PreTrainedModel) -> torch.Tensor:
    config = getattr(model.config, "vision_config", model.config)
    size = getattr(config, "image_size", None) or 64
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    return torch.zeros(BATCH, getattr(config, "num_channels", 3), height, width, dtype=model.dtype)


def spectrograms(model: PreTrainedModel) -> torch.Tensor:
    frames = 2 * getattr(model.config, "max_source_positions", 50)
    return torch.zeros(BATCH, model.config.num_mel_bins, frames, dtype=model.dtype)


BUILDERS: dict[str, Callable[[PreTrainedModel], torch.Tensor]] = {
    "input_ids": lambda model: ids(model.config, SEQUENCE),
    "pixel_values": images,
    "input_features": spectrograms,
    "input_values": lambda model: torch.zeros(BATCH, 4000, dtype=model.dtype),
}
