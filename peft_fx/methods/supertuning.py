"""Super-Tuning, and with a rank its hybrid with LoRA, Supra (2026, arXiv 2607.09287).

    W' = W + scatter(values, indices) + alpha / r * B A

indices: the k = int((1 - sparsity) size) entries of W that are largest (select_top) or smallest, as positions in the flat
canonical weight. values: (k,). A: (r, n), B: (m, r), only with r; alpha is 2 r unless given. Convolutions: n is the patch.
Starts as the identity (values and B are 0), except with init_weights=False. With save_precomputed_indices=False files hold
no indices: they are chosen again from the base weight. lora_dropout is refused with r: the weight is rewritten.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch

from ..config import LORA_ONLY, AdapterConfig, check_rank
from ..errors import RecipeError
from .base import Rewrite, Tensor
from .inits import constant, kaiming, normal, zeros
from .shapes import as_matrix, columns, experts, per_expert

MAX_SIZE = 2**31  # files hold positions as int32


@dataclass(frozen=True)
class SupertuningConfig(AdapterConfig):
    peft_type = "SUPERTUNING"
    absent = LORA_ONLY | {"bias", "exclude_modules", "layers_pattern", "layers_to_transform"}

    sparsity: float = 0.99
    select_top: bool = True
    r: int | None = None
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    init_weights: bool = True
    save_precomputed_indices: bool = True

    def __post_init__(self):
        super().__post_init__()
        if not 0.0 <= self.sparsity < 1.0:
            raise RecipeError(f"sparsity: expected 0 <= sparsity < 1, got {self.sparsity!r}")
        if self.r is None:
            return
        check_rank("r", self.r)
        if self.lora_alpha is None:
            object.__setattr__(self, "lora_alpha", float(2 * self.r))
        if self.lora_dropout:
            raise RecipeError(f"lora_dropout={self.lora_dropout!r}: the weight is rewritten, set it to 0")


class SuperTuning(Rewrite):
    name = "SUPERTUNING"
    Config = SupertuningConfig
    refuses = {"norm": "Super-Tuning picks entries of a matrix; name the norm in modules_to_save to train it whole"}

    def check(self, target, config):
        size = math.prod(target.shape)
        if size > MAX_SIZE:
            return f"{size} entries are more than int32 positions reach; nearest valid: {MAX_SIZE}"
        if number(size, config) < 1:
            nearest = math.floor((1 - 1 / size) * 1e4) / 1e4
            return f"sparsity={config.sparsity} leaves none of {size} entries; nearest valid: {nearest}"
        return None

    def tensors(self, target, config):
        k, key = number(math.prod(target.shape), config), "supertuning_indices"
        saved = key if config.save_precomputed_indices else None
        chosen = partial(extremes, config.select_top)
        spec = {
            "supertuning_values": Tensor((k,), zeros if config.init_weights else normal, "supertuning_values"),
            "supertuning_indices": Tensor((k,), chosen, saved, trainable=False, dtype=torch.int32),
        }
        if config.r is None:
            return spec
        A, B = (*experts(target), config.r, columns(target)), (*experts(target), target.out_features, config.r)
        drawn = per_expert(kaiming, target)
        return spec | {
            "supertuning_lora_A": Tensor(A, drawn, "supertuning_lora_A.weight"),
            "supertuning_lora_B": Tensor(B, zeros if config.init_weights else drawn, "supertuning_lora_B.weight"),
            "scaling": Tensor((), partial(constant, config.lora_alpha / config.r), trainable=False),
        }

    def neutral(self, target, config):
        return {"supertuning_values": 0.0} | ({} if config.r is None else {"supertuning_lora_B": 0.0})

    def weight(self, W, b, theta, target, config):
        new = W.flatten().scatter_add(0, theta["supertuning_indices"].long(), theta["supertuning_values"])
        new = new.reshape(W.shape)
        if config.r is not None:
            BA = theta["scaling"] * theta["supertuning_lora_B"] @ theta["supertuning_lora_A"]
            new = (as_matrix(new, target) + BA).reshape(W.shape)
        return new, b


def number(size: int, config) -> int:
    """How many entries are trained."""
    return int(size * (1 - config.sparsity))


def extremes(largest, indices, W):
    indices.copy_(torch.topk(W.abs().flatten(), len(indices), largest=largest).indices)
