"""What transformers says of models that it loaded quantized."""

from __future__ import annotations

import torch
from torch import nn

# as transformers calls the methods whose layers have 16-bit parameters of their own, which stay as they are
WITH_HALVES = frozenset({"gptq", "aqlm", "eetq", "torchao", "hqq"})


def brings_halves(model: nn.Module) -> bool:
    """Whether the model's 16-bit parameters belong to its packed weights."""
    return str(getattr(model, "quantization_method", "")) in WITH_HALVES or getattr(model, "hqq_quantized", False)


def is_loaded_packed(model: nn.Module) -> bool:
    """Whether its weights were packed while it was loaded, all other numbers being the model's."""
    return any(getattr(model, f"is_loaded_in_{bits}bit", False) for bits in (4, 8))


def holds_packed(parameter: nn.Parameter | torch.Tensor) -> bool:
    """Whether the elements of a parameter are packed numbers, whatever its dtype."""
    return type(parameter).__name__ == "Params4bit"
