"""How files hold logits of which only the k largest count: the numbers of these, and all but the last of their weights.

A row of weights, a softmax, sums to 1; the logits that are read are its logarithms, and -inf for what was not chosen.
"""

from __future__ import annotations

from functools import partial

import torch

from ..target import sizes
from .base import Pieces

# PEFT's types for the numbers of fewer rows than this
INTEGERS = ((2**8, torch.uint8), (2**15, torch.int16), (2**31, torch.int32))


def topk_pieces(k: int) -> Pieces:
    return Pieces(2, logits_of, partial(chosen, k), ends=("_topk_indices", "_topk_weights"))


def chosen(k: int, logits) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows, in the smallest type, and all weights but the last."""
    largest, rows = logits.topk(k, dim=-1)
    dtype = next((dtype for limit, dtype in INTEGERS if logits.shape[-1] < limit), torch.int64)
    return rows.to(dtype), largest.softmax(-1)[..., :-1]


def logits_of(logits, pieces) -> str | None:
    """The inverse of `chosen`."""
    (rows, weights), (*blocks, N) = pieces, logits.shape
    if [*rows.shape[:-1]] != blocks or weights.shape != (*blocks, rows.shape[-1] - 1):
        return (
            f"expected rows {sizes((*blocks, 'k'))} and weights {sizes((*blocks, 'k - 1'))}, got {sizes(rows.shape)} and "
            f"{sizes(weights.shape)}"
        )
    if rows.is_floating_point() or rows.min() < 0 or rows.max() >= N:
        return f"expected numbers of rows from 0 to {N - 1}"
    weights = torch.cat([weights, (1 - weights.sum(-1, keepdim=True)).clamp(min=0)], dim=-1)
    logits.fill_(-torch.inf).scatter_(-1, rows.long(), weights.log().to(logits.dtype))
    return None
