"""peft_fx::requantized: a weight as it is after it was packed again, for training that sees what a merge will make of it.

    requantized(W, old, tensors, names, format) = dequantize(quantize(W))        W itself where it is still `old`
    dW = the gradient of the result                                              straight through, arXiv:1308.3432

old: the packed weight's dense numbers. tensors, names: its packed ones in order. W: of any floating dtype; the result has
that of the format. Of what a package makes of W only the scheme knows (`peft_fx.storage.base.Storage.requantized`).
"""

from __future__ import annotations

import torch

from .packed import LIBRARY, of

LIBRARY.define(
    "requantized(Tensor W, Tensor old, Tensor[] tensors, str[] names, str format) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def requantized(W, old, tensors, names, format):
    storage, f = of(format)
    if torch.equal(W, old.to(W.dtype)):  # a merge leaves it as it is
        return old.to(f.dtype, copy=True)
    return storage.requantized(W, dict(zip(names, tensors, strict=True)), f)


LIBRARY.impl("requantized", requantized, "CompositeExplicitAutograd")


@torch.library.register_fake("peft_fx::requantized", lib=LIBRARY)
def _(W, old, tensors, names, format):
    _, f = of(format)
    return W.new_empty(f.shape, dtype=f.dtype)


class Requantized(torch.autograd.Function):
    @staticmethod
    def forward(ctx, W, *others):
        ctx.dtype = W.dtype
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.peft_fx.requantized(W, *others)

    @staticmethod
    def backward(ctx, g):
        return g.to(ctx.dtype), None, None, None, None


LIBRARY.impl("requantized", Requantized.apply, "Autograd")
