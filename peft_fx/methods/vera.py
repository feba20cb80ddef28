"""VeRA: Vector-based Random Matrix Adaptation (Kopiczko et al. 2023, arXiv 2310.11454).

    W' = W + diag(b) B[:m] diag(d) A[:, :n]        A: (r, max n), B: (max m, r), frozen and shared by all targets

A and B are drawn from a CPU generator seeded with projection_prng_key, A first, uniform in +-sqrt(6 / fan_in), so that files
need not hold them (save_projection=False). Starts as the identity (b = 0). As in PEFT, the largest sizes are those of all
targets of the adapter.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import init

from ..config import LORA_ONLY, AdapterConfig, check_rank
from .base import Additive, Factors, Tensor, Together
from .inits import constant, normal


@dataclass(frozen=True)
class VeraConfig(AdapterConfig):
    peft_type = "VERA"
    absent = LORA_ONLY | {"exclude_modules"}

    r: int = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    fan_in_fan_out: bool = False
    init_weights: bool = True

    def __post_init__(self):
        super().__post_init__()
        check_rank("r", self.r)


class VeRA(Additive):
    name = "VERA"
    Config = VeraConfig

    def check(self, target, config):
        if len(target.shape) != 2:
            return f"VeRA's shared projections are matrices; this weight has shape {target.shape}"
        return None

    def dropout(self, config):
        return config.vera_dropout

    def tensors(self, target, config):
        d, b = (
            (partial(constant, config.d_initial), partial(constant, 0.0))
            if config.init_weights
            else (normal, partial(constant, 1.0))
        )
        return {
            "vera_lambda_b": Tensor((target.out_features,), b, "vera_lambda_b"),
            "vera_lambda_d": Tensor((config.r,), d, "vera_lambda_d"),
            "scaling": Tensor((), partial(constant, 1.0), trainable=False),
        }

    def together(self, targets, config):
        if not targets:
            return Together()
        A = (config.r, max(t.in_features for t in targets))
        B = (max(t.out_features for t in targets), config.r)
        key = "vera_A" if config.save_projection else None, "vera_B" if config.save_projection else None
        return Together({
            "vera_A": Tensor(A, partial(projection, config.projection_prng_key, A, B, 0), key[0], trainable=False),
            "vera_B": Tensor(B, partial(projection, config.projection_prng_key, A, B, 1), key[1], trainable=False),
        })  # fmt: skip

    def factors(self, theta, target, config):
        A = theta["vera_A"][:, : target.in_features] * theta["vera_lambda_d"].unsqueeze(1)
        B = theta["vera_B"][: target.out_features] * theta["vera_lambda_b"].unsqueeze(1)
        return Factors(A, B, theta["scaling"])


def projection(seed: int, A: tuple, B: tuple, which: int, tensor, W=None):
    """Both are drawn in order; the one asked for is kept, rounded through the base's dtype as PEFT does."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [init.kaiming_uniform_(torch.empty(shape), generator=generator) for shape in (A, B)]
    tensor.copy_(drawn[which].to(tensor.dtype if W is None else W.dtype))
