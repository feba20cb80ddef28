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
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from ..config import LORA_ONLY, AdapterConfig
from ..fields import checked, one_of, probability, rank
from .base import Tensor, Together
from .decompositions import left_singular, right_singular
from .draws import seeded_normal
from .inits import normal, uniform, zeros
from .matrices import Matrices, row_size


@dataclass
class TinyLoraConfig(AdapterConfig):
    peft_type = "TINYLORA"
    absent = LORA_ONLY | {"exclude_modules"}
    ranked = "r"

    r: int = rank(2)
    u: int = rank(64)
    weight_tying: float = checked(0.0, lambda share: 0 <= share <= 1, "0 (own vectors) to 1 (one for all)")
    projection_seed: int = 42
    save_projection: bool = True
    init_v_bound: float = 0.02
    tinylora_dropout: float = probability()
    fan_in_fan_out: bool = False
    init_weights: bool | str = one_of(True, False, "uniform")


class TinyLoRA(Matrices):
    name = "TINYLORA"
    Config = TinyLoraConfig
    drops = "tinylora_dropout"

    AS_STORED = frozenset({"embedding"})  # operator kinds whose canonical weight is factored as its transpose

    def tensors(self, target, config):
        m, n = target.out_features, row_size(target)
        r, swap = min(config.r, m, n), target.kind in self.AS_STORED
        rows, columns = (n, m) if swap else (m, n)
        right, left = partial(right_singular, swap), partial(left_singular, swap)
        return {
            "tinylora_A": Tensor((r, columns), right, "tinylora_A", trainable=False, pad=((0, 1),)),
            "tinylora_B": Tensor((rows, r), left, "tinylora_B", trainable=False, needs=("tinylora_A",), pad=((1, 1),)),
        }

    def together(self, targets, config):
        groups = max(1, round(len(targets) * (1 - config.weight_tying)))
        size = max(1, len(targets) // groups)
        key = "tinylora_P" if config.save_projection else None
        members: dict[int, list[str]] = {}
        own: dict[str, dict[str, Tensor]] = {}
        for i, t in enumerate(targets):
            members.setdefault(min(i // size, groups - 1), []).append(t.name)
            r = min(config.r, t.out_features, row_size(t))
            draw = partial(seeded_normal, config.projection_seed + i, 1 / math.sqrt(r))
            pad = ((0, 1), (1, 1), (2, 1))
            own[t.name] = {"tinylora_P": Tensor((config.u, r, r), draw, key, False, pad=pad, derived=key is None)}
        starts: dict[object, Callable] = {True: zeros, False: normal, "uniform": partial(uniform, config.init_v_bound)}
        start = starts[config.init_weights]
        vectors = {g: {"tinylora_v": Tensor((config.u,), start, f"tinylora_v.{g}", pad=((0, 1),))} for g in members}
        return Together(own=own, grouped=tuple((vectors[g], tuple(names)) for g, names in members.items()))

    def matrices(self, theta, target, config):
        A, B = theta["tinylora_A"], theta["tinylora_B"]
        R = torch.einsum("u,uij->ij", theta["tinylora_v"], theta["tinylora_P"])
        return (B.mT, A.mT @ R.mT) if target.kind in self.AS_STORED else (A, B @ R)
