"""peft_fx::circulant: the product with a matrix of circulant blocks, by FFT.

    circulant(x, k) = [sum_e C_ae x_e for a]     C_ae[t, s] = k[a, e, (s - t) mod q]     x: (..., E q), k: (A, E, q)
                    = irfft(sum_e conj(rfft(k_ae)) rfft(x_e))                            -> (..., A q)

Both gradients are the operator itself: of x with the blocks transposed, C_aeᵀ in place (e, a); of k with the rows of x as the
blocks' columns and those of the gradient as kernels. Transforms are in fp32 at least.
"""

from __future__ import annotations

import math

import torch
from torch.utils.flop_counter import register_flop_formula

from .stacking import register_gradients, register_stacking, rows, wide


def reference(x: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """The definition, by the matrix that the operator avoids; k (A, E, q) only."""
    C = torch.stack([k.roll(t, -1) for t in range(k.shape[-1])], 1)  # (A, t, E, s)
    return x @ C.flatten(2).flatten(0, 1).mT


@torch.library.custom_op("peft_fx::circulant", mutates_args=())
def circulant(x: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """(..., E q) -> (..., A q); with k (*S, A, E, q), x is (*S, ..., E q)."""
    (A, E, q), stack = k.shape[-3:], k.dim() - 3
    X, K = wide(rows(x, stack), k, torch.float32)
    X, K = torch.fft.rfft(X.unflatten(-1, (E, q))), torch.fft.rfft(K)
    Y = X.movedim(-1, stack) @ K.conj().movedim(-1, stack).mT  # (*S, frequency, rows, A)
    return torch.fft.irfft(Y.movedim(stack, -1), n=q).reshape(*x.shape[:-1], A * q).to(x.dtype).contiguous()


@circulant.register_fake
def _(x, k):
    return x.new_empty(*x.shape[:-1], k.shape[-3] * k.shape[-1])


def gradients(ctx, g):
    x, k = ctx.saved_tensors
    q, stack = k.shape[-1], k.dim() - 3
    dx = dk = None
    if ctx.needs_input_grad[0]:
        reversed_k = k.flip(-1).roll(1, -1)
        dx = circulant(g, reversed_k.transpose(-3, -2)).to(x.dtype)
    if ctx.needs_input_grad[1]:
        X, G = (rows(t, stack).unflatten(-1, (-1, q)).transpose(-3, -2) for t in (x, g))  # (*S, E, k, q), (*S, A, k, q)
        dk = circulant(X.flatten(-2), G).unflatten(-1, (-1, q)).transpose(-3, -2).to(k.dtype)
    return dx, dk


register_gradients(circulant, gradients)
register_stacking(circulant, axes=3)


@register_flop_formula(torch.ops.peft_fx.circulant)
def flops(x, k, *, out_shape=None, **kwargs):
    A, E, q = k[-3:]
    points = (torch.Size(x).numel() + torch.Size(x).numel() // E * A + torch.Size(k).numel()) * math.log2(2 * q)
    return int(2.5 * points) + 4 * torch.Size(x).numel() * A
