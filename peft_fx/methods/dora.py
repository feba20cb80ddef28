"""DoRA: Weight-Decomposed Low-Rank Adaptation (Liu et al. 2024, arXiv 2402.09353): LoraConfig(use_dora=True).

    V  = W + s B A                                       A, B, s: as in LoRA
    W' = m * V / ||V||                                   m: (out,), one magnitude per row; the norm is over all other axes
    y' = y + (c - 1) W x + c s B (A x)                   c = m / ||V||
    ||V||² = ||W||² + 2 s <W Aᵀ, B> + s² <B (A Aᵀ), B>   row by row, so that B A is never made

The norm counts as a constant in the gradient (section 4.3 of the paper). m starts as the norms of V, so that the method
starts where LoRA does, as the identity. Files hold m as (out,), on convolutions as (1, out, 1, ...). Experts, which PEFT
refuses: A (experts, r, in), B (experts, out, r) and m (experts, out).
Deviations from PEFT: grouped and dilated convolutions work; a row of zeros stays zero, where PEFT has 0 / 0. Input dropout
reaches W x too, as in PEFT: y' = y + (W' - W) dropout(x).
"""

from __future__ import annotations

from functools import partial

import torch

from .base import Branch, Tensor, block_diagonal
from .lora import LoRA, LoraConfig


class DoRA(Branch):
    name = "DORA"
    Config = LoraConfig
    refuses = LoRA.refuses
    reads = ("W", "y")
    drops = "lora_dropout"
    lora = LoRA()

    def check(self, target, config):
        if config.lora_bias:
            return "lora_bias is not part of DoRA; set one of lora_bias and use_dora to False"
        return self.lora.check(target, config)

    def dense_groups(self, target):
        return self.lora.dense_groups(target)

    def tensors(self, target, config):
        shape = (1, target.out_features, *(1,) * len(target.kernel)) if target.kernel else (target.out_features,)
        spec = self.lora.tensors(target, config)
        start = partial(norms_at_start, self.lora, target, config, tuple(spec))
        return spec | {"lora_magnitude_vector": Tensor(shape, start, "lora_magnitude_vector", needs=tuple(spec))}

    def weight(self, W, b, theta, target, config):
        V, _ = self.lora.weight(W, None, theta, target, config)
        return V * share(theta, row_norms(V).detach()).reshape(-1, *(1,) * (V.dim() - 1)), b

    def delta(self, x, theta, target, config):
        f = self.lora.factors(theta, target, config)
        c = share(theta, norms_of_sum(*(t.detach() for t in (theta["W"], f.A, f.scale * f.B))).to(x.dtype))
        return (c - 1) * theta["y"] + c * (x @ f.A.mT @ (f.scale * f.B).mT)


def share(theta, norms):
    """c = m / ||V||, finite on rows of zeros."""
    return theta["lora_magnitude_vector"].flatten() / norms.clamp_min(torch.finfo(norms.dtype).tiny)


def row_norms(W):
    """(out,): the norm of everything that leads to one output feature."""
    return torch.linalg.vector_norm(W, dim=tuple(range(1, W.dim())))


def norms_of_sum(W, A, B):
    """`row_norms` of W + B A, in fp32 at least: the terms may cancel."""
    W, A, B = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (W, A, B))
    update = 2 * (W @ A.mT) + B @ (A @ A.mT)
    return (row_norms(W).square() + (update * B).sum(-1)).clamp_min(0).sqrt()


def norms_at_start(lora, target, config, names, tensor, W, *values):
    theta = {name: t.to(tensor.dtype) for name, t in zip(names, values, strict=True)}
    if target.groups > 1:
        W = block_diagonal(W, target.groups)
    V, _ = lora.weight(W.to(tensor.dtype), None, theta, target, config)
    tensor.copy_(row_norms(V).reshape(tensor.shape))
