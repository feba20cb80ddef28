"""Super-Tuning, and with a rank its hybrid with LoRA, Supra (2026, arXiv 2607.09287).

    W' = W + scatter(values, indices) + alpha / r * B A

indices: the k = int((1 - sparsity) size) entries of W that are largest (select_top) or smallest, as positions in the flat
canonical weight. values: (k,). A: (r, n), B: (m, r), only with r; alpha is 2 r unless given. Convolutions: n is the patch.
Starts as the identity (values and B are 0), except with init_weights=False. With save_precomputed_indices=False files hold
no indices: they are chosen again from the base weight. lora_dropout is on the input of A alone, so that it needs the
activation form, and a linear weight; token ids are not dropped. PEFT has linear weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional as F

from ..config import LORA_ONLY, AdapterConfig
from ..fields import probability, rank
from .base import Tensor
from .entries import Entries
from .inits import drawn_after, kaiming, normal, zeros
from .matrices import row_size
from .scales import fixed

MAX_SIZE = 2**31  # files hold positions as int32


@dataclass
class SupertuningConfig(AdapterConfig):
    peft_type = "SUPERTUNING"
    absent = LORA_ONLY | {"bias", "exclude_modules", "layers_pattern", "layers_to_transform"}

    sparsity: float = probability(0.99)
    select_top: bool = True
    r: int | None = rank(None)
    lora_alpha: float | None = None
    lora_dropout: float = probability()
    init_weights: bool = True
    save_precomputed_indices: bool = True

    def __post_init__(self):
        super().__post_init__()
        if self.r is not None and self.lora_alpha is None:
            self.lora_alpha = float(2 * self.r)


class SuperTuning(Entries):
    name = "SUPERTUNING"
    Config = SupertuningConfig
    one_size = "entries of zero would need positions of their own"
    off = {"supertuning_values": 0.0, "supertuning_lora_B": 0.0}
    values = "supertuning_values"

    def check(self, target, config):
        size = math.prod(target.shape)
        if size > MAX_SIZE:
            return f"{size} entries are more than int32 positions reach; nearest valid: {MAX_SIZE}"
        if number(size, config) < 1:
            nearest = math.floor((1 - 1 / size) * 1e4) / 1e4
            return f"sparsity={config.sparsity} leaves none of {size} entries; nearest valid: {nearest}"
        return None

    def activation_only(self, target, config):
        dropped = config.r is not None and config.lora_dropout and not target.reads_ids
        return f"lora_dropout={config.lora_dropout} on the input of A" if dropped else None

    def literals(self, target, config):
        return (self.activation_only(target, config),)

    def tensors(self, target, config):
        size, name = math.prod(target.shape), "supertuning_indices"
        k, key = number(size, config), name if config.save_precomputed_indices else None
        values, B = (zeros, zeros) if config.init_weights else (normal, kaiming)
        spec = {
            "supertuning_values": Tensor((k,), values, "supertuning_values"),
            name: Tensor((k,), partial(extremes, config.select_top), key, False, torch.int32, below=size),
        }
        if config.r is None:
            return spec
        of_A, of_B = (config.r, row_size(target)), (target.out_features, config.r)
        start_A = partial(drawn_after, kaiming, (of_A, of_B), kaiming)
        return spec | {
            "supertuning_lora_A": Tensor(of_A, start_A, "supertuning_lora_A.weight", pad=((0, 1),)),
            "supertuning_lora_B": Tensor(of_B, B, "supertuning_lora_B.weight", pad=((1, 1),)),
            "scaling": fixed(config.lora_alpha / config.r),
        }

    def cells(self, theta, target):
        place, n = theta["supertuning_indices"].long(), row_size(target)
        return place // n, place % n

    def delta(self, x, theta, target, config):
        dy = super().delta(x, theta, target, config)
        if config.r is None:
            return dy
        x = F.dropout(x, config.lora_dropout, True) if config.lora_dropout else x
        return dy + x @ theta["supertuning_lora_A"].mT @ theta["supertuning_lora_B"].mT * theta["scaling"]

    def weight(self, W, b, theta, target, config):
        W, b = super().weight(W, b, theta, target, config)
        if config.r is not None:
            W = W + (theta["scaling"] * theta["supertuning_lora_B"] @ theta["supertuning_lora_A"]).reshape(W.shape)
        return W, b


def number(size: int, config) -> int:
    """How many entries are trained."""
    return int(size * (1 - config.sparsity))


def extremes(largest, indices, W):
    indices.copy_(torch.topk(W.abs().flatten(), len(indices), largest=largest).indices)
