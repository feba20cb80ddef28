"""peft_fx::dequantize, packed_linear, packed_embedding: a weight that is kept packed, by the scheme that a format names.

    dequantize(tensors, format)               = W              shape and dtype as the format says
    packed_linear(x, tensors, bias, format)   = x Wᵀ + bias    gradients of x and bias
    packed_embedding(ids, tensors, format)    = W[ids]         of the rows that are asked for alone, where the scheme can

tensors: the packed numbers, which get no gradient. format: the text of a `peft_fx.storage.formats.Format`. The backward of
`packed_linear` dequantizes once more: nothing dense lives between forward and backward. What W is a scheme says in plain ATen
(`peft_fx/storage/`), which `passes/export/unpack.py` puts in the place of `dequantize`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

Tensors = Sequence[torch.Tensor]


known: dict[str, tuple[Any, Any]] = {}
readers: list[
    Callable[[str], tuple[Any, Any]]
] = []  # `storage/schemes.py` is it: what knows schemes lies above the operators


def of(text: str) -> tuple[Any, Any]:
    """(storage, format) that a text stands for; kept, since any call asks."""
    found = known.get(text)
    if found is None:
        found = known[text] = readers[0](text)
    return found


# Not `custom_op`: its checks for aliases and its autograd take three times as long as a small product.
LIBRARY = torch.library.Library("peft_fx", "FRAGMENT")
for schema in (
    "dequantize(Tensor[] tensors, str format) -> Tensor",
    "packed_linear(Tensor x, Tensor[] tensors, Tensor? bias, str format) -> Tensor",
    "packed_embedding(Tensor ids, Tensor[] tensors, str format) -> Tensor",
):
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


def dequantize(tensors: Tensors, format: str) -> torch.Tensor:
    storage, f = of(format)
    return storage.dense(tensors, f)


def packed_linear(x: torch.Tensor, tensors: Tensors, bias: torch.Tensor | None, format: str) -> torch.Tensor:
    storage, f = of(format)
    own = storage.linear(x, tensors, bias, f)
    return F.linear(x, dequantize(tensors, format).to(x.dtype), bias) if own is None else own


def packed_embedding(ids: torch.Tensor, tensors: Tensors, format: str) -> torch.Tensor:
    storage, f = of(format)
    return storage.rows(tensors, ids, f)


for body in (dequantize, packed_linear, packed_embedding):
    LIBRARY.impl(body.__name__, body, "CompositeExplicitAutograd")


@torch.library.register_fake("peft_fx::dequantize", lib=LIBRARY)
def _(tensors, format):
    _, f = of(format)
    return tensors[0].new_empty(f.shape, dtype=f.dtype)


@torch.library.register_fake("peft_fx::packed_linear", lib=LIBRARY)
def _(x, tensors, bias, format):
    return x.new_empty(*x.shape[:-1], of(format)[1].shape[0])


@torch.library.register_fake("peft_fx::packed_embedding", lib=LIBRARY)
def _(ids, tensors, format):
    _, f = of(format)
    return tensors[0].new_empty(*ids.shape, f.shape[1], dtype=f.dtype)


class PackedLinear(torch.autograd.Function):
    """dx = g W, dbias = sum of g's rows."""

    @staticmethod
    def forward(ctx, x, bias, format, *tensors):
        ctx.format, ctx.biased = format, bias is not None
        ctx.save_for_backward(*tensors)  # a swap of these in between raises
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.peft_fx.packed_linear(x, tensors, bias, format)

    @staticmethod
    def backward(ctx, g):
        dx = dbias = None
        tensors = ctx.saved_tensors  # once: where a checkpoint recomputes, they can be had once
        if ctx.needs_input_grad[0]:
            dx = g @ torch.ops.peft_fx.dequantize(tensors, ctx.format).to(g.dtype)
        if ctx.biased and ctx.needs_input_grad[1]:
            dbias = g.flatten(0, -2).sum(0)
        return dx, dbias, None, *(None for _ in tensors)


def differentiable(x: torch.Tensor, tensors: Tensors, bias: torch.Tensor | None, format: str) -> torch.Tensor:
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return PackedLinear.apply(x, bias, format, *tensors)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.peft_fx.packed_linear(x, tensors, bias, format)


LIBRARY.impl("packed_linear", differentiable, "Autograd")


def without_gradient(name: str) -> None:
    op = getattr(torch.ops.peft_fx, name).default

    def call(*args):
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    LIBRARY.impl(name, call, "Autograd")


without_gradient("dequantize")
without_gradient("packed_embedding")


@register_flop_formula(torch.ops.peft_fx.packed_linear)
def flops(x, tensors, bias, format, *, out_shape=None, **kwargs):
    """The product; what the scheme reads it with is no multiplication of matrices."""
    rows = 1
    for size in x[:-1]:
        rows *= size
    return 2 * rows * x[-1] * out_shape[-1]
