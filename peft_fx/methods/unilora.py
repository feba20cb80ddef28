"""Uni-LoRA (Li et al. 2025, arXiv 2506.00799): one trained vector, dealt out to all factors.

    W' = W + B A,   A = theta[i_A] s_A,  B = theta[i_B] s_B        theta: (d,), shared; i, s: the shapes of A (r, n), B (out, r)

The positions are a shuffled list in which every entry of theta occurs equally often, give or take one, numpy's generator
seeded with proj_seed; targets take theirs in turn, A first. s = 1 / sqrt(occurrences of that entry). Files hold positions
and scales only with save_indices. Not the identity at the start: theta is uniform in +-init_theta_d_bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from ..config import LORA_ONLY, AdapterConfig
from ..fields import positive, probability, rank
from .base import Tensor, Together
from .draws import dealt_positions, dealt_scales
from .inits import drawn_over, integers, normal, uniform
from .matrices import Matrices, row_size


@dataclass
class UniLoraConfig(AdapterConfig):
    peft_type = "UNILORA"
    absent = LORA_ONLY | {"exclude_modules"}
    ranked = "r"

    r: int = rank(4)
    proj_seed: int = 42
    theta_d_length: int = positive(256)
    init_theta_d_bound: float = positive(0.02)
    unilora_dropout: float = probability()
    fan_in_fan_out: bool = False
    save_indices: bool = False
    init_weights: bool = True


class UniLoRA(Matrices):
    name = "UNILORA"
    Config = UniLoraConfig
    drops = "unilora_dropout"

    def tensors(self, target, config):
        return {}

    def together(self, targets, config):
        d = config.theta_d_length
        deal = (sum(config.r * (t.out_features + row_size(t)) for t in targets), d, config.proj_seed)
        own: dict[str, dict[str, Tensor]] = {}
        first = 0
        for t in targets:
            specs = own[t.name] = {}
            for factor, shape, axis in ("A", (config.r, row_size(t)), 0), ("B", (t.out_features, config.r), 1):
                indices, scale = f"unilora_indices_{factor}", f"unilora_scales_{factor}"
                keys, pad = (indices, scale) if config.save_indices else (None, None), ((axis, 1),)
                drawn = partial(drawn_over, partial(integers, d), partial(dealt_positions, deal, first))
                fixed = partial(Tensor, shape, trainable=False, pad=pad, derived=not config.save_indices)
                specs[indices] = fixed(drawn, keys[0], dtype=torch.int64, below=d)
                specs[scale] = fixed(partial(dealt_scales, deal, first), keys[1])
                first += shape[0] * shape[1]
        start = partial(uniform, config.init_theta_d_bound) if config.init_weights else normal
        return Together({"unilora_theta_d": Tensor((d,), start, "unilora_theta_d", pad=((0, 1),))}, own)

    def matrices(self, theta, target, config):
        values = theta["unilora_theta_d"]
        return tuple(values[theta[f"unilora_indices_{f}"]] * theta[f"unilora_scales_{f}"] for f in "AB")
