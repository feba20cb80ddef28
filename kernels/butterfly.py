"""peft_fx::butterfly: rotates blocks of the last axis, scattered as a factor of a butterfly has them.

    butterfly(x, R, blocks) = x P blockdiag(R_1 .. R_D) Pᵀ         x: (..., n), R: (D, c, c), D c = n
    P brings together chunks j and j + blocks in every group of 2 * blocks chunks of c / 2 features; blocks = 1: P = I

No (n, n) matrix exists. Gradients: of x the same with Rᵀ; of R the outer products x_dᵀ g_d of the blocks.
"""

from __future__ import annotations

import torch
from torch.utils.flop_counter import register_flop_formula

from .stacking import exactly, register_gradients, register_stacking, rows, wide

NARROW = 16  # below this block size the products are faster with the rows of x last


def reference(x: torch.Tensor, R: torch.Tensor, blocks: int) -> torch.Tensor:
    """The definition, by the matrices that the operator avoids; R (D, c, c) only."""
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    P = gathered(eye, R.shape[-1], blocks).flatten(-2)
    return x @ P @ torch.block_diag(*R) @ P.mT


@torch.library.custom_op("peft_fx::butterfly", mutates_args=())
def butterfly(x: torch.Tensor, R: torch.Tensor, blocks: int) -> torch.Tensor:
    """(..., n) -> (..., n); with R (*E, D, c, c), x is (*E, ..., n)."""
    c, stack = R.shape[-1], R.dim() - 3
    with exactly(x):
        X, Q = wide(x, R)
        X = gathered(rows(X, stack), c, blocks)  # (*E, k, D, c)
        if c < NARROW:
            Y = (Q.mT @ X.movedim(stack, -1)).movedim(-1, stack)
        else:
            Y = (X.transpose(stack, stack + 1) @ Q).transpose(stack, stack + 1)
        return scattered(Y, blocks).reshape(x.shape).to(x.dtype).contiguous()


@butterfly.register_fake
def _(x, R, blocks):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def gradients(ctx, g):
    x, R = ctx.saved_tensors
    (c, (blocks,)), stack = (R.shape[-1], ctx.rest), R.dim() - 3
    dx = butterfly(g, R.mT, blocks) if ctx.needs_input_grad[0] else None
    if not ctx.needs_input_grad[1]:
        return dx, None, None
    with exactly(x):
        X, G = (gathered(rows(t.to(R.dtype), stack), c, blocks).movedim(stack, -1) for t in (x, g))
        return dx, X @ G.mT, None


register_gradients(butterfly, gradients)
register_stacking(butterfly, axes=3)


@register_flop_formula(torch.ops.peft_fx.butterfly)
def flops(x, R, blocks, *, out_shape=None, **kwargs):
    return 2 * R[-1] * torch.Size(x).numel()


def gathered(x: torch.Tensor, c: int, blocks: int) -> torch.Tensor:
    """x P, (..., n) -> (..., D, c)"""
    if blocks == 1:
        return x.unflatten(-1, (-1, c))
    return x.unflatten(-1, (-1, 2, blocks, c // 2)).transpose(-3, -2).flatten(-2).flatten(-3, -2)


def scattered(x: torch.Tensor, blocks: int) -> torch.Tensor:
    """x Pᵀ, (..., D, c) -> (..., n)"""
    if blocks == 1:
        return x.flatten(-2)
    halves = x.unflatten(-2, (-1, blocks)).unflatten(-1, (2, -1))
    return halves.transpose(-3, -2).flatten(-4)
