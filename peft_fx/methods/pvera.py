"""PVeRA: Probabilistic Vector-based Random Matrix Adaptation (Fillioux et al. 2025, arXiv 2512.07703).

    mu, logvar = halves of d * (A[:, :n] x)        A: (2 r, max n), B: (max m, r), frozen and shared, d: (2 r,)
    y = W x + b * (B[:m] z),   z = mu + exp(logvar / 2) * normal noise while training, z = mu otherwise

    W' = W + diag(b) B[:m] diag(d[:r]) A[:r, :n]   with z = mu: evaluation, merging

sample_at_inference draws the noise always; a merge has the mean even then. The noise comes from torch's global generator, or
with generator_seed from one on the CPU for every target, whose state is a tensor of the adapter; numbers bit for bit PEFT's.
A and B as in VeRA. PEFT has linear weights; on convolutions x is the patch, and embeddings have noise for every token.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional as F

from ..config import LORA_ONLY, AdapterConfig
from ..fields import probability, rank
from ..kernels.noise import seeded_noise
from .base import Tensor
from .vera import VeRA


@dataclass
class PveraConfig(AdapterConfig):
    peft_type = "PVERA"
    absent = LORA_ONLY | {"exclude_modules"}
    ranked = "r"

    r: int = rank(256)
    projection_prng_key: int = 0
    save_projection: bool = True
    pvera_dropout: float = probability()
    d_initial: float = 0.1
    fan_in_fan_out: bool = False
    init_weights: bool = True
    sample_at_inference: bool = False
    generator_seed: int | None = None


class PVeRA(VeRA):
    name = "PVERA"
    Config = PveraConfig  # type: ignore[assignment]  # beside VeRA's, not derived from it
    refuses = {"expert": "PVeRA draws noise for the tokens of one product, which a stack of experts cannot tell apart"}
    drops = "pvera_dropout"
    written = ("sample_at_inference",)
    prefix = "pvera"
    halves = 2

    def activation_only(self, target, config):
        return "noise while training"

    def tensors(self, target, config):
        spec = super().tensors(target, config)
        if config.generator_seed is not None:
            start = partial(generator_state, config.generator_seed)
            spec["generator"] = Tensor((5056,), start, trainable=False, dtype=torch.uint8)
        return spec

    def between(self, h, axis, theta, target, config):
        groups = h.movedim(axis, -1).unflatten(-1, (target.groups, -1))  # of a convolution
        mean, logvar = groups.chunk(2, dim=-1)
        dtype = theta["pvera_lambda_d"].dtype
        if "generator" in theta:
            noise = seeded_noise(mean.detach().to(dtype), theta["generator"], config.sample_at_inference, True)
        else:
            noise = torch.randn_like(mean, dtype=dtype)
        z = mean + (0.5 * logvar).exp() * noise
        if not config.sample_at_inference:
            keeps = F.dropout(mean.new_ones(()), 1.0, True)  # 0 while training, 1 otherwise
            z = torch.where(keeps == 0, z, mean)
        return z.flatten(-2).movedim(-1, axis)

    def weight(self, W, b, theta, target, config):  # type: ignore[override]  # without `out`
        A, B = self.matrices(theta, target, config)
        return torch.addmm(W.flatten(1), B, A.chunk(2)[0]).reshape(W.shape), b


def generator_state(seed: int, tensor, W=None):
    tensor.copy_(torch.Generator().manual_seed(seed).get_state())
