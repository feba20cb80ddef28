"""RoAd: 3-in-1 2D Rotary Adaptation (Liao and Monz 2024, arXiv 2409.00119).

    y' = R (W x + b)         groups of g outputs; j and j + g / 2 of a group are a pair
    y'_j       = c_j       y_j       - s_j       y_{j+g/2}             c = alpha cos theta, s = alpha sin theta
    y'_{j+g/2} = c_{j+g/2} y_{j+g/2} + s_{j+g/2} y_j

    road_1: one (alpha, theta) per pair, (m / 2,)     road_2: one per output, (m,)
    road_4: one for c and another for s, (2 m,): per group g for the cosines, then g for the sines

Output map: acts on every kind of operator with output features, bias included. Starts as the identity (theta 0, alpha 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import init

from ..config import LORA_ONLY, AdapterConfig
from ..errors import RecipeError
from .base import OutputMap, Tensor
from .inits import ones, scaled_normal, zeros

SIZES = {"road_1": 0.5, "road_2": 1, "road_4": 2}  # variant -> numbers per output feature


@dataclass(frozen=True)
class RoadConfig(AdapterConfig):
    peft_type = "ROAD"
    absent = LORA_ONLY | {"exclude_modules", "layers_to_transform", "layers_pattern", "bias"}

    variant: str = "road_1"
    group_size: int = 64
    init_weights: bool = True

    def __post_init__(self):
        super().__post_init__()
        if self.variant not in SIZES:
            raise RecipeError(f"variant={self.variant!r}: expected one of {tuple(SIZES)}")
        if self.group_size <= 0 or self.group_size % 2:
            raise RecipeError(f"group_size={self.group_size}: expected an even number of 2 or more")


class RoAd(OutputMap):
    name = "ROAD"
    Config = RoadConfig
    refuses = {"norm": "RoAd rotates the output features of a product; a norm's weight is 1-d"}

    def check(self, target, config):
        m, g = target.out_features, config.group_size
        if m % g:
            valid = [d for d in range(2, m + 1, 2) if m % d == 0]
            nearest = min(valid, key=lambda d: abs(d - g)) if valid else "none"
            return f"group_size={g} does not divide {m} output features; nearest valid: {nearest}"
        return None

    def tensors(self, target, config):
        shape = (*(target.shape[:-2] if target.experts else ()), int(target.out_features * SIZES[config.variant]))
        theta, alpha = (zeros, ones) if config.init_weights else (partial(scaled_normal, 0.5), around_one)
        return {
            "road_theta": Tensor(shape, theta, "road_theta"),
            "road_alpha": Tensor(shape, alpha, "road_alpha"),
        }

    def neutral(self, target, config):
        return {"road_theta": 0.0, "road_alpha": 1.0}

    def literals(self, target, config):
        return config.variant, config.group_size

    def map_output(self, y, theta, target, config):
        half = config.group_size // 2
        c, s = coefficients(theta["road_theta"], theta["road_alpha"], config.variant, half)
        if target.experts and y.dim() > 2:
            c, s = c.unsqueeze(-2), s.unsqueeze(-2)
        first, second = y.unflatten(-1, (-1, 2, half)).unbind(-2)
        return y * c + torch.stack((-second, first), -2).flatten(-3) * s


def coefficients(theta, alpha, variant: str, half: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine factor of every output feature."""
    if variant == "road_4":
        theta, alpha = (t.unflatten(-1, (-1, 2, 2 * half)) for t in (theta, alpha))
        c, s = alpha.select(-2, 0) * theta.select(-2, 0).cos(), alpha.select(-2, 1) * theta.select(-2, 1).sin()
        return c.flatten(-2), s.flatten(-2)
    c, s = alpha * theta.cos(), alpha * theta.sin()
    if variant == "road_1":
        c, s = (t.unflatten(-1, (-1, half)).repeat_interleave(2, -2).flatten(-2) for t in (c, s))
    return c, s


def around_one(tensor, W=None):
    init.normal_(tensor, mean=1.0, std=0.5)
