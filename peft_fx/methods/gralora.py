"""GraLoRA: Granular Low-Rank Adaptation (Jung et al. 2025, arXiv 2505.20355).

    dW[block a, block c] = s (A_c[:, slice a] B_a[slice c, :])ᵀ         k x k blocks, s = alpha / (r + hybrid_r)
    W' = W + dW + s B_general A_general                                 the last term with hybrid_r > 0

A: (k, in / k, r), B: (k, r, out / k); slice j: the j-th of k equal parts of the rank. In the product every input block is
projected to rank r once, the slices change places between blocks, and every output block is expanded once. Starts as the
identity (B = 0). PEFT has Linear and Conv1D, with inputs of two or three axes; here any number, and convolutions as
matrices (out, in / groups * kernel). While training both terms see the same dropped input; in PEFT each draws its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

import torch

from ..config import LORA_ONLY, AdapterConfig, check_rank
from ..errors import RecipeError
from .base import Branch, Tensor
from .inits import constant, each, kaiming, zeros


@dataclass(frozen=True)
class GraloraConfig(AdapterConfig):
    peft_type = "GRALORA"
    absent = LORA_ONLY | {"exclude_modules"}

    r: int = 32
    hybrid_r: int = 0
    alpha: float = 64
    gralora_dropout: float = 0.0
    gralora_k: int = 2
    fan_in_fan_out: bool = False
    init_weights: bool = True

    def __post_init__(self):
        super().__post_init__()
        check_rank("r", self.r)
        check_rank("gralora_k", self.gralora_k)
        if self.hybrid_r:
            check_rank("hybrid_r", self.hybrid_r)
        if self.r % self.gralora_k:
            nearest = max(round(self.r / self.gralora_k), 1) * self.gralora_k
            raise RecipeError(f"r={self.r} is not divisible by gralora_k={self.gralora_k}; nearest valid: {nearest}")
        if not 0.0 <= self.gralora_dropout < 1.0:
            raise RecipeError(f"gralora_dropout: expected 0 <= p < 1, got {self.gralora_dropout!r}")

    def with_rank(self, rank):
        return replace(self, r=rank)


class GraLoRA(Branch):
    name = "GRALORA"
    refuses = {"norm": "GraLoRA divides matrices into blocks; this weight has shape {shape}"}
    Config = GraloraConfig

    def check(self, target, config):
        m, n, k = target.out_features, columns(target), config.gralora_k
        if m % k or n % k:
            common = math.gcd(m, n, config.r)
            valid = [d for d in range(1, common + 1) if common % d == 0]
            return f"gralora_k={k} does not divide both {m} and {n}; valid with r={config.r}: {valid}"
        if config.gralora_dropout and target.kind != "linear":
            return f"gralora_dropout needs kind linear, this is {target.kind}; set it to 0"
        return None

    def dropout(self, config):
        return config.gralora_dropout

    def tensors(self, target, config):
        m, n, r, k, h = target.out_features, columns(target), config.r, config.gralora_k, config.hybrid_r
        E = target.shape[:1] if target.experts else ()
        down = kaiming_blocks
        up = zeros if config.init_weights else kaiming_blocks
        spec = {
            "scaling": Tensor((), partial(constant, config.alpha / (r + h)), trainable=False),
            "gralora_A": Tensor((*E, k, n // k, r), down, "gralora_A", pad=((len(E) + 2, k),)),
            "gralora_B": Tensor((*E, k, r, m // k), up, "gralora_B", pad=((len(E) + 1, k),)),
        }
        if h:
            start = partial(each, kaiming) if E else kaiming
            general = {
                "A": ((*E, h, n), start, len(E)),
                "B": ((*E, m, h), zeros if config.init_weights else start, len(E) + 1),
            }
            for side, (shape, init, axis) in general.items():
                name = f"gralora_{side}_general"
                spec[name] = Tensor(shape, init, f"{name}.weight", pad=((axis, 1),))
        return spec

    def neutral(self, target, config):
        return {"gralora_B": 0.0} | ({"gralora_B_general": 0.0} if config.hybrid_r else {})

    def delta(self, x, theta, target, config):
        A, B, k = theta["gralora_A"], theta["gralora_B"], config.gralora_k
        h = torch.einsum("...ci,cir->...cr", x.unflatten(-1, (k, -1)), A)
        h = h.unflatten(-1, (k, -1)).transpose(-3, -2).flatten(-2)  # (..., c, a, q) -> (..., a, c q)
        y = torch.einsum("...ar,aro->...ao", h, B).flatten(-2)
        if config.hybrid_r:
            y = y + x @ theta["gralora_A_general"].mT @ theta["gralora_B_general"].mT
        return theta["scaling"] * y

    def weight(self, W, b, theta, target, config):
        k = config.gralora_k
        A, B = theta["gralora_A"].unflatten(-1, (k, -1)), theta["gralora_B"].unflatten(-2, (k, -1))
        dW = torch.einsum("...ciaq,...acqo->...aoci", A, B).flatten(-4, -3).flatten(-2)
        if config.hybrid_r:
            dW = dW + theta["gralora_B_general"] @ theta["gralora_A_general"]
        return W + (theta["scaling"] * dW).reshape(W.shape), b


def columns(target) -> int:
    """Columns of the weight as a matrix."""
    return target.in_features // target.groups * math.prod(target.kernel)


def kaiming_blocks(tensor, W=None):
    """Each block's transpose: the fan-in of a block (in / k, r) is in / k."""
    for block in tensor.flatten(0, -3):
        kaiming(block.mT)
