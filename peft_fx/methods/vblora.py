"""VB-LoRA: Vector Bank (Li et al. 2024, arXiv 2405.15179).

    W' = W + B A        every block of v numbers in A's rows and B's columns:  sum over its top-k logits of softmax * bank row
    bank: (N, v), shared by all targets; logits_A: (r, n / v, N), logits_B: (out / v, r, N)

Not the identity at the start: the product of two small random matrices. Files written with save_only_topk_weights hold the
chosen rows and k - 1 of their weights instead of the logits (the last weight is what is missing to 1): they are read, run,
merged and written again, but not trained.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch

from ..config import LORA_ONLY, AdapterConfig, check_rank
from .base import Tensor, Together
from .inits import scaled_normal, uniform, zeros
from .matrices import Matrices, row_size


@dataclass(frozen=True)
class VBLoRAConfig(AdapterConfig):
    peft_type = "VBLORA"
    absent = LORA_ONLY

    r: int = 4
    num_vectors: int = 256
    vector_length: int = 256
    topk: int = 2
    save_only_topk_weights: bool = False
    vblora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    init_vector_bank_bound: float = 0.02
    init_logits_std: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        for what in ("r", "num_vectors", "vector_length", "topk"):
            check_rank(what, getattr(self, what))

    def with_rank(self, rank):
        return replace(self, r=rank)


class VBLoRA(Matrices):
    name = "VBLORA"
    Config = VBLoRAConfig

    def at(self, target, config):
        return VBLoRATopK() if config.save_only_topk_weights and config.inference_mode else self

    def check(self, target, config):
        if reason := super().check(target, config):
            return reason
        if config.save_only_topk_weights and not config.inference_mode:
            return "save_only_topk_weights leaves no logits to train; train with save_only_topk_weights=False"
        v, N = config.vector_length, config.num_vectors
        if config.topk > N:
            return f"topk={config.topk} is more than num_vectors={N}; nearest valid: {N}"
        for what, size in ("out", target.out_features), ("in", row_size(target)):
            if size % v:
                nearest = max(d for d in range(1, min(v, size) + 1) if size % d == 0)
                return f"vector_length={v} does not divide the {what} features {size}; nearest valid: {nearest}"
        return None

    def dropout(self, config):
        return config.vblora_dropout

    def blocks(self, target, config) -> dict[str, tuple[int, int]]:
        v = config.vector_length
        return {
            "vblora_logits_A": (config.r, row_size(target) // v),
            "vblora_logits_B": (target.out_features // v, config.r),
        }

    def tensors(self, target, config):
        start = partial(scaled_normal, config.init_logits_std)
        return {k: Tensor((*b, config.num_vectors), start, k) for k, b in self.blocks(target, config).items()}

    def together(self, targets, config):
        shape, start = (config.num_vectors, config.vector_length), partial(uniform, config.init_vector_bank_bound)
        return Together({"vblora_vector_bank": Tensor(shape, start, "vblora_vector_bank")})

    def mixture(self, name, theta, config):
        """(blocks..., v): the rows of the bank that `name` chooses, in its proportions."""
        logits, rows = theta[name].topk(config.topk, dim=-1)
        return (logits.softmax(-1).unsqueeze(-1) * theta["vblora_vector_bank"][rows]).sum(-2)

    def matrices(self, theta, target, config):
        A, B = (self.mixture(name, theta, config) for name in ("vblora_logits_A", "vblora_logits_B"))
        return A.flatten(1), B.mT.flatten(0, 1)


class VBLoRATopK(VBLoRA):
    """What a file with save_only_topk_weights holds."""

    name = "VBLORA_TOPK"

    def tensors(self, target, config):
        rows = smallest_integer(config.num_vectors)
        spec = {}
        for name, blocks in self.blocks(target, config).items():
            indices, weights = f"{name}_topk_indices", f"{name}_topk_weights"
            spec[indices] = Tensor((*blocks, config.topk), zeros, indices, trainable=False, dtype=rows)
            spec[weights] = Tensor((*blocks, config.topk - 1), zeros, weights, trainable=False)
        return spec

    def mixture(self, name, theta, config):
        rows, weights = theta[f"{name}_topk_indices"], theta[f"{name}_topk_weights"]
        weights = torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], dim=-1)
        return (weights.unsqueeze(-1) * theta["vblora_vector_bank"][rows.long()]).sum(-2)


def smallest_integer(rows: int) -> torch.dtype:
    """The type in which PEFT files the numbers of `rows` rows."""
    sizes = ((2**8, torch.uint8), (2**15, torch.int16), (2**31, torch.int32))
    return next((dtype for limit, dtype in sizes if rows < limit), torch.int64)
