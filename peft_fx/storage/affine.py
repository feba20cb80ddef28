"""Integers low..high with a scale and a zero point for each block.

W = (q - z) s       symmetric: s = max|W| / ((high - low) / 2), z = 0
                    otherwise: s = (max W - min W) / (high - low), z = clamp(low - round(min W / s), low, high), both with 0
q = clamp(round(W / s) + z, low, high)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .blocks import grid_of, spread


def fitted(
    W: torch.Tensor, block: Sequence[int], low: int, high: int, *, symmetric: bool, wide: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, zero point) of each block, in W's dtype; wide: in float32, and not below its epsilon."""
    least, most = grid_of(W, block, torch.amin).clamp(max=0), grid_of(W, block, torch.amax).clamp(min=0)
    eps = torch.finfo(torch.float32).eps if wide else torch.finfo(W.dtype).smallest_normal
    span = torch.maximum(-least, most) * 2 if symmetric else most - least
    scale = (span / (high - low)).clamp(min=eps)
    zero = torch.zeros_like(scale) if symmetric else (low - (least / scale).round()).clamp(low, high)
    return (scale.float() if wide else scale), zero


def codes(
    W: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, block: Sequence[int], low: int, high: int
) -> torch.Tensor:
    """q as numbers of the scale's dtype, or W's if that is wider."""
    inverse, zeros = spread(1.0 / scale, block, W.shape), spread(zero, block, W.shape)
    return ((W * inverse).round() + zeros).clamp(low, high)
