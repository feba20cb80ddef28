"""RandLoRA: full-rank updates from random bases (Albert et al. 2025, arXiv 2502.00987).

    W' = W + (alpha / r) sum_t B_t Lambda A_t Gamma        transposed where out < in, so that A has the smaller side

    A: (r, 1, lo), B: (hi, bases, r), frozen and shared; a target uses A[:, :, :min(out, in)], B[:max(out, in), :nb]
    lambda: (r, nb), gamma: (nb, min(out, in)), nb = ceil(min(out, in) / r)

As in PEFT, whose numbers files hold, row t of the scaled A is (rank t // nb, base t % nb) while column t of B is (base t // r,
rank t % r). Both are drawn from a CPU generator seeded with projection_prng_key: dense ones in bfloat16, A first, then B base by
base, uniform in +-1/sqrt(fan_in); sparse ones are -1, 0, 1. Each is divided by its standard deviation. lo and hi are the
smaller and larger of the largest sizes of all targets. Starts as the identity (lambda = 0). PEFT writes A and B once more for
every module; such copies are accepted in a file, and not written.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import init

from ..config import LORA_ONLY, AdapterConfig, check_rank
from ..errors import RecipeError
from .base import Additive, Factors, Tensor, Together
from .inits import constant, normal, zeros


@dataclass(frozen=True)
class RandLoraConfig(AdapterConfig):
    peft_type = "RANDLORA"
    absent = LORA_ONLY | {"exclude_modules"}

    r: int = 32
    projection_prng_key: int = 0
    save_projection: bool = True
    sparse: bool = False
    very_sparse: bool = False
    randlora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    randlora_alpha: float = 640
    init_weights: bool = True

    def __post_init__(self):
        super().__post_init__()
        check_rank("r", self.r)
        if not 0.0 <= self.randlora_dropout < 1.0:
            raise RecipeError(f"randlora_dropout: expected 0 <= p < 1, got {self.randlora_dropout!r}")


class RandLora(Additive):
    name = "RANDLORA"
    Config = RandLoraConfig

    def check(self, target, config):
        if len(target.shape) != 2:
            return f"RandLoRA's shared bases are matrices; this weight has shape {target.shape}"
        if target.kind == "embedding" and config.randlora_dropout:
            return "randlora_dropout cannot drop token ids; set it to 0"
        return None

    def dropout(self, config):
        return config.randlora_dropout

    def tensors(self, target, config):
        low, high = sorted((target.in_features, target.out_features))
        bases = math.ceil(low / config.r)
        value = 1 / max(bases, low) if config.init_weights else 1 / high
        return {
            "randlora_lambda": Tensor((config.r, bases), zeros if config.init_weights else normal, "randlora_lambda"),
            "randlora_gamma": Tensor((bases, low), partial(constant, value), "randlora_gamma"),
            "scaling": Tensor((), partial(constant, config.randlora_alpha / config.r), trainable=False),
        }

    def together(self, targets, config):
        if not targets:
            return Together()
        low, high = sorted((max(t.in_features for t in targets), max(t.out_features for t in targets)))
        A, B = (config.r, 1, low), (high, math.ceil(low / config.r), config.r)
        seed = config.projection_prng_key
        draw = partial(dense, seed, A, B)
        if config.sparse or config.very_sparse:
            draw = partial(sparse, seed, A, B, math.sqrt(low) if config.very_sparse else 3)
        keys = ("randlora_A", "randlora_B") if config.save_projection else (None, None)
        return Together({
            "randlora_A": Tensor(A, partial(base, draw, 0), keys[0], trainable=False),
            "randlora_B": Tensor(B, partial(base, draw, 1), keys[1], trainable=False),
        })  # fmt: skip

    def factors(self, theta, target, config):
        lambda_, gamma = theta["randlora_lambda"].unsqueeze(-1), theta["randlora_gamma"]
        bases, low = gamma.shape
        A = (lambda_ * theta["randlora_A"][..., :low] * gamma).flatten(0, 1)
        B = theta["randlora_B"][: max(target.in_features, target.out_features), :bases].flatten(1)
        if low == target.in_features:
            return Factors(A, B, theta["scaling"])
        return Factors(B.mT, A.mT, theta["scaling"])


def dense(seed: int, A: tuple, B: tuple) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape):
        return init.kaiming_uniform_(torch.empty(shape, dtype=torch.bfloat16), a=math.sqrt(5), generator=generator)

    return drawn(*A), torch.cat([drawn(B[0], 1, B[2]) for _ in range(B[1])], dim=1)


def sparse(seed: int, A: tuple, B: tuple, sparsity: float) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.rand(shape, generator=generator) for shape in (A, B)]
    edge = 1 / (2 * sparsity)
    return tuple((u > 1 - edge).float() - (u < edge).float() for u in drawn)


def base(draw, which: int, tensor, W=None):
    """Both bases are drawn in order; the one asked for is kept, rounded through the base's dtype as PEFT does."""
    drawn = draw()[which]
    drawn = drawn / drawn.std()
    tensor.copy_(drawn.to(tensor.dtype if W is None else W.dtype))
