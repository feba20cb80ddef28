"""Adapters in slots of a larger rank: zeros behind their numbers, block by block."""

from __future__ import annotations

import torch


def pad_to(tensor: torch.Tensor, shape: tuple[int, ...], pad: tuple[tuple[int, int], ...]) -> torch.Tensor:
    """`tensor` with zeros appended up to `shape`, block by block along the padded axes."""
    for axis, blocks in pad:
        parts = tensor.unflatten(axis, (blocks, -1))
        missing = shape[axis] // blocks - parts.shape[axis + 1]
        zeros = parts.new_zeros(*parts.shape[: axis + 1], missing, *parts.shape[axis + 2 :])
        tensor = torch.cat([parts, zeros], dim=axis + 1).flatten(axis, axis + 1)
    return tensor


def crop_to(tensor: torch.Tensor, shape: tuple[int, ...], pad: tuple[tuple[int, int], ...]) -> torch.Tensor:
    """The inverse of `pad_to`: drops what was appended."""
    for axis, blocks in pad:
        tensor = tensor.unflatten(axis, (blocks, -1)).narrow(axis + 1, 0, shape[axis] // blocks).flatten(axis, axis + 1)
    return tensor
