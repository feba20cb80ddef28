"""Inputs that a layer rounds to 8 bits ahead of its product: each row, or the whole, by a scale of its own.

    int8        x' = (q - z) s          `affine.py`
    float8      x' = float8(x / s) s    s = max|x| / the largest float8

The product of x' with the dense weight is the layer's own but for the order of the roundings. Backward takes x' for x.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from .affine import codes, fitted
from .blocks import divisor


def rounded(x: torch.Tensor, how: dict[str, Any]) -> torch.Tensor:
    """x as the layer sees it, in its dtype.

    how: {"to": "int8" or a float8, "rows": whether each row has its scale}, and for int8 "low", "high", "symmetric", "wide".
    """
    rows = x.reshape(-1, x.shape[-1])
    block = (1, rows.shape[1]) if how["rows"] else rows.shape
    if how["to"] == "int8":
        low, high = how["low"], how["high"]
        scale, zero = fitted(rows, block, low, high, symmetric=how["symmetric"], wide=how["wide"])
        rows = (codes(rows, scale, zero, block, low, high) - zero) * scale
    else:
        kind = getattr(torch, how["to"])
        largest = torch.finfo(kind).max
        scale = (rows.abs().amax((-1,) if how["rows"] else (0, 1), keepdim=True) / largest).float()
        rows = (rows.float() / divisor(scale)).clamp(-largest, largest).to(kind).float() * scale
    return rows.to(x.dtype).reshape(x.shape)


def product(x: torch.Tensor, W: torch.Tensor, bias: torch.Tensor | None, how: dict[str, Any]) -> torch.Tensor:
    """x' Wᵀ + bias."""
    return F.linear(rounded(x, how), W.to(x.dtype), bias)
