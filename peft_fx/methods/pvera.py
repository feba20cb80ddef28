"""PVeRA: Probabilistic Vector-based Random Matrix Adaptation (Fillioux et al. 2025, arXiv 2512.07703).

    mu, logvar = halves of d * (A[:, :n] x)        A: (2 r, max n), B: (max m, r), frozen and shared, d: (2 r,)
    y = W x + b * (B[:m] z),   z = mu + exp(logvar / 2) * normal noise while training, z = mu otherwise

    W' = W + diag(b) B[:m] diag(d[:r]) A[:r, :n]   with z = mu: evaluation, merging

sample_at_inference draws the noise always; a merge has the mean even then. The noise comes from torch's global generator, as
in PEFT without a generator_seed; the numbers of a generator_seed are not drawn again. A and B are drawn from a CPU generator
seeded with projection_prng_key, A first, uniform in +-sqrt(6 / fan_in). Starts as the identity (b = 0).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional as F

from ..config import LORA_ONLY, AdapterConfig, check_rank
from ..errors import RecipeError
from .base import Branch, Tensor, Together
from .inits import constant, normal
from .vera import projection


@dataclass(frozen=True)
class PveraConfig(AdapterConfig):
    peft_type = "PVERA"
    absent = LORA_ONLY | {"exclude_modules"}

    r: int = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    pvera_dropout: float = 0.0
    d_initial: float = 0.1
    fan_in_fan_out: bool = False
    init_weights: bool = True
    sample_at_inference: bool = False
    generator_seed: int | None = None

    def __post_init__(self):
        super().__post_init__()
        check_rank("r", self.r)
        if not 0.0 <= self.pvera_dropout < 1.0:
            raise RecipeError(f"pvera_dropout: expected 0 <= p < 1, got {self.pvera_dropout!r}")
        if self.sample_at_inference and self.generator_seed is not None:
            raise RecipeError(
                f"generator_seed={self.generator_seed!r} is refused with sample_at_inference: a graph draws from torch's "
                "global generator; set it to None and call torch.manual_seed"
            )


class PVeRA(Branch):
    name = "PVERA"
    Config = PveraConfig
    refuses = {
        "embedding": "PVeRA draws noise for every token, which an embedding's weight cannot hold; choose kind linear"
    }

    def check(self, target, config):
        if len(target.shape) != 2:
            return f"PVeRA's shared projections are matrices; this weight has shape {target.shape}"
        return None

    def dropout(self, config):
        return config.pvera_dropout

    def activation_only(self, target, config):
        return "noise while training"

    def literals(self, target, config):
        return (config.sample_at_inference,)

    def tensors(self, target, config):
        d, b = (config.d_initial, 0.0) if config.init_weights else (None, 1.0)
        return {
            "pvera_lambda_b": Tensor((target.out_features,), partial(constant, b), "pvera_lambda_b"),
            "pvera_lambda_d": Tensor((2 * config.r,), normal if d is None else partial(constant, d), "pvera_lambda_d"),
        }

    def together(self, targets, config):
        if not targets:
            return Together()
        A = (2 * config.r, max(t.in_features for t in targets))
        B = (max(t.out_features for t in targets), config.r)
        keys = ("pvera_A", "pvera_B") if config.save_projection else (None, None)
        draw = partial(projection, config.projection_prng_key, A, B)
        return Together({
            "pvera_A": Tensor(A, partial(draw, 0), keys[0], trainable=False),
            "pvera_B": Tensor(B, partial(draw, 1), keys[1], trainable=False),
        })  # fmt: skip

    def factors(self, theta, target):
        A = theta["pvera_A"][:, : target.in_features] * theta["pvera_lambda_d"].unsqueeze(-1)
        return A, theta["pvera_B"][: target.out_features] * theta["pvera_lambda_b"].unsqueeze(-1)

    def delta(self, x, theta, target, config):
        A, B = self.factors(theta, target)
        mean, logvar = (x @ A.mT).chunk(2, dim=-1)
        z = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
        if not config.sample_at_inference:
            keeps = F.dropout(mean.new_ones(()), 1.0, True)  # 0 while training, 1 otherwise
            z = torch.where(keeps == 0, z, mean)
        return z @ B.mT

    def weight(self, W, b, theta, target, config):
        A, B = self.factors(theta, target)
        return torch.addmm(W, B, A.chunk(2)[0]), b
