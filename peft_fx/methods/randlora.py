"""RandLoRA: full-rank updates from random bases (Albert et al. 2025, arXiv 2502.00987).

    W' = W + (alpha / r) sum_t B_t Lambda A_t Gamma        transposed where m < n, so that A has the smaller side

    A: (r, 1, lo), B: (hi, bases, r), frozen and shared; a target uses A[:, :, :min(m, n)], B[:max(m, n), :nb]
    lambda: (r, nb), gamma: (nb, min(m, n)), nb = ceil(min(m, n) / r)

As in PEFT, whose numbers files hold, row t of the scaled A is (rank t // nb, base t % nb) while column t of B is (base t // r,
rank t % r). Both are drawn from a CPU generator seeded with projection_prng_key: dense ones in bfloat16, A first, then B base by
base, uniform in +-1/sqrt(fan_in); sparse ones are -1, 0, 1. Each is divided by its standard deviation. lo and hi are the
smaller and larger of the largest sizes of all targets. Starts as the identity (lambda = 0). PEFT writes A and B once more for
every module; such copies are accepted in a file, and not written. It has linear weights; n is a convolution's patch here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

from ..config import LORA_ONLY, AdapterConfig
from ..fields import probability, rank
from .base import Tensor
from .draws import dense_bases, largest, projections, sparse_bases
from .inits import constant, drawn_over, normal, zeros
from .matrices import Matrices, row_size
from .scales import fixed


@dataclass
class RandLoraConfig(AdapterConfig):
    peft_type = "RANDLORA"
    absent = LORA_ONLY | {"exclude_modules"}

    r: int = rank(32)
    projection_prng_key: int = 0
    save_projection: bool = True
    sparse: bool = False
    very_sparse: bool = False
    randlora_dropout: float = probability()
    fan_in_fan_out: bool = False
    randlora_alpha: float = 640
    init_weights: bool = True


class RandLora(Matrices):
    name = "RANDLORA"
    Config = RandLoraConfig
    one_size = "r says how many bases there are"
    drops = "randlora_dropout"

    def tensors(self, target, config):
        low, high = sorted((row_size(target), target.out_features))
        bases = math.ceil(low / config.r)
        value = 1 / max(bases, low) if config.init_weights else 1 / high
        start = partial(drawn_over, normal, zeros) if config.init_weights else normal
        return {
            "randlora_lambda": Tensor((config.r, bases), start, "randlora_lambda"),
            "randlora_gamma": Tensor((bases, low), partial(constant, value), "randlora_gamma"),
            "scaling": fixed(config.randlora_alpha / config.r),
        }

    def together(self, targets, config):
        low, high = sorted(largest(targets))
        A, B = (config.r, 1, low), (high, math.ceil(low / config.r), config.r)
        sparsity = math.sqrt(low) if config.very_sparse else 3
        draw = partial(sparse_bases, sparsity) if config.sparse or config.very_sparse else dense_bases
        return projections("randlora", draw, A, B, config)

    def matrices(self, theta, target, config):
        gamma, scale = theta["randlora_gamma"], theta["scaling"]
        bases, low = gamma.shape
        A = (theta["randlora_lambda"].unsqueeze(-1) * theta["randlora_A"][..., :low] * gamma).flatten(0, 1)
        B = theta["randlora_B"][: max(row_size(target), target.out_features), :bases].flatten(1)
        return (scale * A, B) if low == row_size(target) else (B.mT, scale * A.mT)
