"""Codes of few bits in words, one stream of bits along the last dimension: the first code in the lowest bits.

    code_i = stream[b i : b (i + 1)]

3 bits lie across the bounds of bytes and words (32 codes in three int32); whoever cuts them at words has `unpack_whole`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

Undo = Callable[[], None]


def together(bits: int) -> tuple[int, int]:
    """(codes, bytes) of the smallest part of a stream that begins and ends with a byte."""
    return (8 // bits, 1) if 8 % bits == 0 else (8, bits)


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """(..., n) words of any integer type -> codes (..., at least n * size / bits), uint8 or int32; bits: 1 to 4, or 8."""
    if words.stride(-1) != 1:  # of a transpose with one column too, which calls itself contiguous
        words = words.clone(memory_format=torch.contiguous_format)
    codes, size = together(bits)
    parts = words.view(torch.uint8)
    if size > 1:
        parts = F.pad(parts, (0, -parts.shape[-1] % size)).unflatten(-1, (-1, size)).int()
        parts = sum(parts[..., j] << 8 * j for j in range(size))
    return spread(parts, codes, bits).flatten(-2)


def unpack_whole(words: torch.Tensor, bits: int) -> torch.Tensor:
    """(..., n) int32 -> codes (..., n * (32 // bits)) of which none lies in two words."""
    return spread(words, 32 // bits, bits).flatten(-2)


def spread(words: torch.Tensor, count: int, bits: int) -> torch.Tensor:
    """(...) -> (..., count): the codes of each word."""
    return torch.stack([(words >> bits * i) & ((1 << bits) - 1) for i in range(count)], -1)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """(..., n) codes -> (..., n * bits / 32) int32: what `unpack` undoes. Codes are added up to a whole number of words."""
    codes = F.pad(codes.int(), (0, -codes.shape[-1] % 32))
    count, size = together(bits)
    words = gather(codes.unflatten(-1, (-1, count)), bits)
    parts = torch.stack([(words >> 8 * j) & 255 for j in range(size)], -1).flatten(-2)
    return parts.to(torch.uint8).contiguous().view(torch.int32)


def pack_whole(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """(..., n) codes -> (..., n / (32 // bits)) int32: what `unpack_whole` undoes."""
    count = 32 // bits
    return gather(F.pad(codes.int(), (0, -codes.shape[-1] % count)).unflatten(-1, (-1, count)), bits)


def gather(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """(..., n) int32 codes -> (...) words: what `spread` undoes."""
    words = torch.zeros_like(codes[..., 0])
    for i in range(codes.shape[-1]):
        words = words | codes[..., i] << bits * i
    return words


def nearest(W: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | int, top: int, low: int = 0) -> torch.Tensor:
    """The codes q in low..top of which (q - zero) * scale comes nearest to W, in float32; where the scale is 0, any."""
    inverse = torch.where(scale == 0, 0, 1 / scale.float())
    return (W.detach().float() * inverse + zero).round().clamp(low, top)


def replaced(held: dict, new: dict) -> Undo:
    """Puts other values into a dictionary; returns what puts those back that were there."""
    old = {name: held[name] for name in new}
    held.update(new)
    return lambda: held.update(old)
