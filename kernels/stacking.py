"""What the operators here share: f(x (*E, ..., n), p (*E, ...)), where p may have leading axes *E that x has too.

Of p only its last axes matter to the formula; with more of them p is a stack, and each part acts on its part of x.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch


def rows(x: torch.Tensor, stack: int) -> torch.Tensor:
    """x (*E, ..., n) -> (*E, k, n) with `stack` axes *E."""
    return x.reshape(*x.shape[:stack], -1, x.shape[-1])


def wide(x: torch.Tensor, p: torch.Tensor, least: torch.dtype | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Both in the wider of their dtypes, and in `least` at least."""
    dtype = torch.promote_types(x.dtype, p.dtype)
    dtype = dtype if least is None else torch.promote_types(dtype, least)
    return x.to(dtype), p.to(dtype)


def exactly(tensor: torch.Tensor):
    """Products inside keep the dtypes that they are given, whatever autocast says."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def register_gradients(op, gradients) -> None:
    """gradients(ctx, g) finds x and p in ctx.saved_tensors and the further arguments in ctx.rest."""

    def keep(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2])
        ctx.rest = inputs[2:]

    op.register_autograd(gradients, setup_context=keep)


def register_stacking(op, axes: int) -> None:
    """vmap of op(x, p, *rest): p, whose own axes are `axes`, becomes a stack if it is batched."""

    def batched(info, in_dims, x, p, *rest):
        at_x, at_p = in_dims[:2]
        if at_p is None:  # a further axis of rows
            stack = p.dim() - axes
            return op(x.movedim(at_x, stack), p, *rest), stack
        x = x.expand(info.batch_size, *x.shape) if at_x is None else x.movedim(at_x, 0)
        return op(x, p.movedim(at_p, 0), *rest), 0

    op.register_vmap(batched)
