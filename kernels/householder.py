"""peft_fx::householder: the product of r Householder reflections applied to the last axis, as two thin products.

    householder(x, U, False) = x H_1 ... H_r = x - x V T Vᵀ          H_i = I - 2 v_i v_iᵀ,  v_i = u_i / |u_i|
    householder(x, U, True)  = x H_r ... H_1 = x - x V Tᵀ Vᵀ         x: (..., n), U: (n, r)
    T^-1 = triu(VᵀV, 1) + I / 2                                      the compact WY form

A column of zeros reflects nothing. The (r, r) system is solved in fp32 at least.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from .stacking import exactly, register_gradients, register_stacking, rows, wide


def reference(x: torch.Tensor, U: torch.Tensor, reverse: bool) -> torch.Tensor:
    """The definition, one reflection after another; U (n, r) only."""
    columns = F.normalize(U, dim=0).unbind(1)
    for v in reversed(columns) if reverse else columns:
        x = x - 2 * (x @ v).unsqueeze(-1) * v
    return x


@torch.library.custom_op("peft_fx::householder", mutates_args=())
def householder(x: torch.Tensor, U: torch.Tensor, reverse: bool) -> torch.Tensor:
    """(..., n) -> (..., n); with U (*E, n, r), x is (*E, ..., n)."""
    with exactly(x):
        X, V, T = compact(x, U, reverse)
        return (X - X @ V @ T @ V.mT).reshape(x.shape).to(x.dtype).contiguous()


def compact(x: torch.Tensor, U: torch.Tensor, reverse: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x as rows, V, and T or its transpose."""
    X, U = wide(rows(x, U.dim() - 2), U, torch.float32)
    V = F.normalize(U, dim=-2)
    G = V.mT @ V
    eye = torch.diag_embed(G.new_ones(G.shape[-1])).expand_as(G)
    T = torch.linalg.solve_triangular(G.triu(1) + eye / 2, eye, upper=True)
    return X, V, T.mT if reverse else T


@householder.register_fake
def _(x, U, reverse):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def gradients(ctx, g):
    """Of Y = X - X V T Vᵀ, where T is a function of V too: dT = -T d(T^-1) T."""
    (x, U), (reverse,) = ctx.saved_tensors, ctx.rest
    dx = householder(g, U, not reverse) if ctx.needs_input_grad[0] else None
    if not ctx.needs_input_grad[1]:
        return dx, None, None
    with exactly(x):
        X, V, T = compact(x, U, reverse)
        G = rows(g.to(X.dtype), U.dim() - 2)
        P, Q = X @ V, G @ V
        S = T.mT @ (P.mT @ Q) @ T.mT  # gradient of the inverse of T
        S = S.tril(-1) if reverse else S.triu(1)
        dV = V @ (S + S.mT) - X.mT @ (Q @ T.mT) - G.mT @ (P @ T)
        norm = torch.linalg.vector_norm(U.to(V.dtype), dim=-2, keepdim=True).clamp_min(1e-12)  # as in F.normalize
        return dx, ((dV - V * (V * dV).sum(-2, keepdim=True)) / norm).to(U.dtype), None


register_gradients(householder, gradients)
register_stacking(householder, axes=2)


@register_flop_formula(torch.ops.peft_fx.householder)
def flops(x, U, reverse, *, out_shape=None, **kwargs):
    n, r = U[-2:]
    k = torch.Size(x).numel() // n
    return 4 * k * n * r + 2 * torch.Size(U).numel() * r
