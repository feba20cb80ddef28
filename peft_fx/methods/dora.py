"""DoRA: Weight-Decomposed Low-Rank Adaptation (Liu et al. 2024, arXiv 2402.09353): LoraConfig(use_dora=True).

    V  = W + s B A                                       A, B, s: as in LoRA
    W' = m * V / ||V||                                   m: (out,), one magnitude per row; the norm is over all other axes

The norm counts as a constant in the gradient (section 4.3 of the paper). m starts as the norms of V, so that the method
starts where LoRA does, as the identity. Files hold m as (out,), on convolutions as (1, out, 1, ...).
Deviations from PEFT: grouped and dilated convolutions work; a row of zeros stays zero, where PEFT has 0 / 0. Input dropout
would reach W x too, whose weight is rewritten here, and is refused.
"""

from __future__ import annotations

from functools import partial

import torch

from .base import Rewrite, Tensor, block_diagonal
from .lora import LoRA, LoraConfig


class DoRA(Rewrite):
    name = "DORA"
    Config = LoraConfig
    refuses = LoRA.refuses | {
        "expert": "DoRA has no key for the magnitudes of experts in PEFT's files; set use_dora=False"
    }
    lora = LoRA()

    def check(self, target, config):
        if config.lora_bias:
            return "lora_bias is not part of DoRA; set one of lora_bias and use_dora to False"
        if self.lora.input_dropout(target, config):
            return (
                f"DoRA rewrites the weight, which has no input to drop: lora_dropout={config.lora_dropout}; set it to 0"
            )
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
        norm = row_norms(V).detach().clamp_min(torch.finfo(V.dtype).tiny)
        factor = theta["lora_magnitude_vector"].flatten() / norm
        return V * factor.reshape(-1, *(1,) * (V.dim() - 1)), b


def row_norms(W):
    """(out,): the norm of everything that leads to one output feature."""
    return torch.linalg.vector_norm(W, dim=tuple(range(1, W.dim())))


def norms_at_start(lora, target, config, names, tensor, W, *values):
    theta = {name: t.to(tensor.dtype) for name, t in zip(names, values, strict=True)}
    if target.groups > 1:
        W = block_diagonal(W, target.groups)
    V, _ = lora.weight(W.to(tensor.dtype), None, theta, target, config)
    tensor.copy_(row_norms(V).reshape(tensor.shape))
