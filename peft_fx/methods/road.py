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

from ..config import LORA_ONLY, AdapterConfig
from ..fields import checked, one_of
from .base import OutputMap, Tensor
from .inits import around, ones, scaled_normal, zeros
from .shapes import divisors

SIZES = {"road_1": 0.5, "road_2": 1, "road_4": 2}  # variant -> numbers per output feature


@dataclass
class RoadConfig(AdapterConfig):
    peft_type = "ROAD"
    absent = LORA_ONLY | {"exclude_modules", "layers_to_transform", "layers_pattern", "bias"}

    variant: str = one_of(*SIZES)
    group_size: int = checked(64, lambda g: g > 0 and g % 2 == 0, "an even number of 2 or more")
    init_weights: bool = True


class RoAd(OutputMap):
    name = "ROAD"
    Config = RoadConfig
    refuses = {"norm": "RoAd rotates the output features of a product; a norm's weight is 1-d"}
    written = ("variant", "group_size")
    off = {"road_theta": 0.0, "road_alpha": 1.0}

    def check(self, target, config):
        m, g = target.out_features, config.group_size
        if m % g == 0:
            return None
        nearest = min((d for d in divisors(m) if d % 2 == 0), key=lambda d: abs(d - g), default="none")
        return f"group_size={g} does not divide {m} output features; nearest valid: {nearest}"

    def tensors(self, target, config):
        shape = (int(target.out_features * SIZES[config.variant]),)
        starts = zeros, ones
        if not config.init_weights:
            starts = partial(scaled_normal, 0.5), partial(around, 1.0, 0.5)
        return {name: Tensor(shape, start, name) for name, start in zip(self.off, starts, strict=True)}

    def map_output(self, y, theta, target, config):
        half = config.group_size // 2
        c, s = coefficients(theta["road_theta"], theta["road_alpha"], config.variant, half)
        first, second = y.unflatten(-1, (-1, 2, half)).unbind(-2)
        return y * c + torch.stack((-second, first), -2).flatten(-3) * s


def coefficients(theta, alpha, variant: str, half: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine factor of every output feature."""
    if variant == "road_4":
        (for_c, for_s), (c, s) = (t.unflatten(-1, (-1, 2, 2 * half)).unbind(-2) for t in (theta, alpha))
        return (c * for_c.cos()).flatten(-2), (s * for_s.sin()).flatten(-2)
    c, s = alpha * theta.cos(), alpha * theta.sin()
    if variant == "road_1":
        c, s = (t.unflatten(-1, (-1, half)).repeat_interleave(2, -2).flatten(-2) for t in (c, s))
    return c, s
