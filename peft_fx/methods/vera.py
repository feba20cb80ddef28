"""VeRA: Vector-based Random Matrix Adaptation (Kopiczko et al. 2023, arXiv 2310.11454).

    W' = W + diag(b) B[:m] diag(d) A[:, :n]        A: (r, max n), B: (max m, r), frozen and shared by all targets

A and B are drawn from a CPU generator seeded with projection_prng_key, A first, uniform in +-sqrt(6 / fan_in), so that files
need not hold them (save_projection=False). Starts as the identity (b = 0). As in PEFT, the largest sizes are those of all
targets of the adapter. PEFT has linear weights; a convolution is the matrix (m, n), n its patch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from ..config import LORA_ONLY, AdapterConfig
from ..fields import probability, rank
from .base import Tensor
from .draws import kaiming_pair, largest, projections
from .inits import constant, drawn_over, normal, ones, zeros
from .matrices import Matrices, row_size


@dataclass
class VeraConfig(AdapterConfig):
    peft_type = "VERA"
    absent = LORA_ONLY | {"exclude_modules"}
    ranked = "r"

    r: int = rank(256)
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = probability()
    d_initial: float = 0.1
    fan_in_fan_out: bool = False
    init_weights: bool = True


class VeRA(Matrices):
    name = "VERA"
    Config = VeraConfig
    drops = "vera_dropout"
    prefix = "vera"
    halves = 1  # rows of A for each column of B

    def tensors(self, target, config):
        d = partial(drawn_over, normal, partial(constant, config.d_initial)) if config.init_weights else normal
        b = zeros if config.init_weights else ones
        name_b, name_d = f"{self.prefix}_lambda_b", f"{self.prefix}_lambda_d"
        return {
            name_b: Tensor((target.out_features,), b, name_b),
            name_d: Tensor((self.halves * config.r,), d, name_d, pad=((0, self.halves),)),
        }

    def together(self, targets, config):
        m, n = largest(targets)
        pads = ((0, self.halves),), ((1, 1),)
        return projections(self.prefix, kaiming_pair, (self.halves * config.r, n), (m, config.r), config, pads)

    def matrices(self, theta, target, config):
        A, B, b, d = (theta[f"{self.prefix}_{name}"] for name in ("A", "B", "lambda_b", "lambda_d"))
        return A[:, : row_size(target)] * d.unsqueeze(1), B[: target.out_features] * b.unsqueeze(1)
