"""GraLoRA: Granular Low-Rank Adaptation (Jung et al. 2025, arXiv 2505.20355).

    dW[block a, block c] = s (A_c[:, slice a] B_a[slice c, :])ᵀ         k x k blocks, s = alpha / (r + hybrid_r)
    W' = W + dW + s B_general A_general                                 the last term with hybrid_r > 0

A: (k, in / k, r), B: (k, r, out / k); slice j: the j-th of k equal parts of the rank. The product projects every input block
to rank r once, swaps slices between blocks, and expands every output block once. Starts as the identity (B = 0). PEFT has
Linear and Conv1D, with inputs of two or three axes; here any number, and convolutions as matrices (out, in / groups * kernel).
While training both terms see the same dropped input; in PEFT each draws its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch

from ..checks import MAX_RANK
from ..config import LORA_ONLY, AdapterConfig
from ..errors import RecipeError
from ..fields import checked, probability, rank
from .base import Branch, Tensor
from .inits import drawn_after, kaiming, kaiming_blocks, zeros
from .matrices import row_size
from .scales import fixed
from .shapes import divisors


@dataclass
class GraloraConfig(AdapterConfig):
    peft_type = "GRALORA"
    absent = LORA_ONLY | {"exclude_modules"}
    ranked = "r"

    r: int = rank(32)
    hybrid_r: int = checked(0, lambda r: 0 <= r <= MAX_RANK, f"an integer from 0 to {MAX_RANK}")
    alpha: float = 64
    gralora_dropout: float = probability(0.0)
    gralora_k: int = rank(2)
    fan_in_fan_out: bool = False
    init_weights: bool = True

    def __post_init__(self):
        super().__post_init__()
        if self.r % self.gralora_k:
            nearest = max(round(self.r / self.gralora_k), 1) * self.gralora_k
            raise RecipeError(f"r={self.r} is not divisible by gralora_k={self.gralora_k}; nearest valid: {nearest}")


class GraLoRA(Branch):
    name = "GRALORA"
    Config = GraloraConfig
    refuses = {"norm": "GraLoRA divides matrices into blocks; this weight has shape {shape}"}
    drops = "gralora_dropout"
    off = {"gralora_B": 0.0, "gralora_B_general": 0.0}

    def check(self, target, config):
        m, n, k = target.out_features, row_size(target), config.gralora_k
        valid = divisors(math.gcd(m, n, config.r))
        unfit = f"gralora_k={k} does not divide both {m} and {n}; valid with r={config.r}: {valid}"
        return None if k in valid else unfit

    def tensors(self, target, config):
        m, n, r, k, h = target.out_features, row_size(target), config.r, config.gralora_k, config.hybrid_r
        up, general_up = (zeros, zeros) if config.init_weights else (kaiming_blocks, kaiming)
        general_down = partial(drawn_after, kaiming, ((h, n), (m, h)), kaiming)
        general = {
            "gralora_A_general": Tensor((h, n), general_down, "gralora_A_general.weight", pad=((0, 1),)),
            "gralora_B_general": Tensor((m, h), general_up, "gralora_B_general.weight", pad=((1, 1),)),
        }
        return {
            "scaling": fixed(config.alpha / (r + h)),
            "gralora_A": Tensor((k, n // k, r), kaiming_blocks, "gralora_A", pad=((2, k),)),
            "gralora_B": Tensor((k, r, m // k), up, "gralora_B", pad=((1, k),)),
        } | (general if h else {})

    def delta(self, x, theta, target, config):
        k = config.gralora_k
        h = torch.einsum("...ci,cir->...cr", x.unflatten(-1, (k, -1)), theta["gralora_A"])
        h = h.unflatten(-1, (k, -1)).transpose(-3, -2).flatten(-2)  # (..., c, a, q) -> (..., a, c q)
        y = torch.einsum("...ar,aro->...ao", h, theta["gralora_B"]).flatten(-2)
        if config.hybrid_r:
            y = y + x @ theta["gralora_A_general"].mT @ theta["gralora_B_general"].mT
        return theta["scaling"] * y

    def weight(self, W, b, theta, target, config):
        k = config.gralora_k
        A, B = theta["gralora_A"].unflatten(-1, (k, -1)), theta["gralora_B"].unflatten(-2, (k, -1))
        dW = torch.einsum("ciaq,acqo->aoci", A, B).reshape(target.out_features, -1)
        if config.hybrid_r:
            dW = dW + theta["gralora_B_general"] @ theta["gralora_A_general"]
        return W + (theta["scaling"] * dW).reshape(W.shape), b
