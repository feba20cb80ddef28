"""TinyLoRA: Learning to Reason in 13 Parameters (2026, arXiv 2602.04118), on LoRA-XS (2405.17604).

    W' = W + B R A,   R = sum_i v_i P_i        B = U_r sqrt(S_r), A = sqrt(S_r) V_r of W = U S V
    A: (r', n), B: (out, r'), P: (u, r', r'), all frozen; v: (u,), one per group of targets; r' = min(r, out, n)

Embeddings are factored as they are stored, (V, d): B: (V, r'), A: (r', d). P is N(0, 1 / r'), from a CPU generator seeded
with projection_seed + the target's number, so that files need not hold it (save_projection=False). Groups: consecutive
targets, round(L (1 - weight_tying)) of them. Starts as the identity (v = 0). init_weights=False draws v from N(0, 1);
PEFT leaves it uninitialised. Token ids cannot be dropped out: on embeddings tinylora_dropout has no effect.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

import torch

from ..config import LORA_ONLY, AdapterConfig, check_rank
from ..errors import RecipeError
from .base import Tensor, Together
from .inits import normal, uniform, zeros
from .matrices import Matrices, row_size


@dataclass(frozen=True)
class TinyLoraConfig(AdapterConfig):
    peft_type = "TINYLORA"
    absent = LORA_ONLY | {"exclude_modules"}

    r: int = 2
    u: int = 64
    weight_tying: float = 0.0
    projection_seed: int = 42
    save_projection: bool = True
    init_v_bound: float = 0.02
    tinylora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    init_weights: bool | str = True

    def __post_init__(self):
        super().__post_init__()
        check_rank("r", self.r)
        check_rank("u", self.u)
        if not 0 <= self.weight_tying <= 1:
            raise RecipeError(f"weight_tying={self.weight_tying!r}: expected 0 (own vectors) to 1 (one for all)")
        if self.init_weights not in (True, False, "uniform"):
            raise RecipeError(f"init_weights={self.init_weights!r}: expected True, False or 'uniform'")

    def with_rank(self, rank):
        return replace(self, r=rank)


class TinyLoRA(Matrices):
    name = "TINYLORA"
    Config = TinyLoraConfig

    def dropout(self, config):
        return config.tinylora_dropout

    def tensors(self, target, config):
        r, out, n = self.rank(target, config), target.out_features, row_size(target)
        B, A = (n, out) if target.kind == "embedding" else (out, n)
        stored = target.kind == "embedding"
        return {
            "tinylora_A": Tensor((r, A), partial(singular, "A", stored), "tinylora_A", trainable=False),
            "tinylora_B": Tensor((B, r), partial(singular, "B", stored), "tinylora_B", trainable=False),
        }

    def rank(self, target, config) -> int:
        return min(config.r, target.out_features, row_size(target))

    def together(self, targets, config):
        groups = max(1, round(len(targets) * (1 - config.weight_tying)))
        size = max(1, len(targets) // groups)
        members = {}
        for i, target in enumerate(targets):
            members.setdefault(min(i // size, groups - 1), []).append(target.name)
        start = {True: zeros, False: normal, "uniform": partial(uniform, config.init_v_bound)}[config.init_weights]
        key = "tinylora_P" if config.save_projection else None
        ranks = [self.rank(t, config) for t in targets]
        return Together(
            own={
                t.name: {
                    "tinylora_P": Tensor(
                        (config.u, r, r), partial(projection, config.projection_seed + i), key, trainable=False
                    )
                }
                for i, (t, r) in enumerate(zip(targets, ranks, strict=True))
            },
            grouped=tuple(
                ({"tinylora_v": Tensor((config.u,), start, f"tinylora_v.{g}")}, tuple(names))
                for g, names in members.items()
            ),
        )

    def matrices(self, theta, target, config):
        A, B = theta["tinylora_A"], theta["tinylora_B"]
        R = torch.einsum("u,uij->ij", theta["tinylora_v"], theta["tinylora_P"])
        return (B.mT, A.mT @ R.mT) if target.kind == "embedding" else (A, B @ R)


def singular(which: str, stored: bool, tensor, W):
    """A = sqrt(S) V or B = U sqrt(S) of the largest singular values, rounded through the base's dtype as PEFT does."""
    W = W.mT if stored else W.flatten(1)
    r = tensor.shape[0] if which == "A" else tensor.shape[1]
    U, S, V = torch.linalg.svd(W.to(torch.promote_types(W.dtype, torch.float32)), full_matrices=False)
    root = S[:r].to(W.dtype).sqrt()
    tensor.copy_(root[:, None] * V[:r].to(W.dtype) if which == "A" else U[:, :r].to(W.dtype) * root)


def projection(seed: int, tensor, W):
    P = torch.normal(0.0, 1 / math.sqrt(tensor.shape[1]), tensor.shape, generator=torch.Generator().manual_seed(seed))
    tensor.copy_(P.to(W.dtype))
