"""C3A: Circular Convolution Adaptation (Chen et al. 2024, arXiv 2407.19342).

    W' = W + D / in,   block (a, e) of D is circulant: D_ae[t, s] = k[a, e, (s - t) mod q]        k: (out / q, in / q, q)
    y  = W x + irfft(sum_e conj(rfft(k_ae)) rfft(x_e)) / in        q = block_size

Not the identity at the start, unless init_weights is True. Convolutions: the weight is the matrix (out, rest). PEFT has
nn.Linear only, reverses the kernel in the gradient with respect to x, and gives a second active adapter the output of the
first instead of the input.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import init

from ..config import LORA_ONLY, AdapterConfig, by_pattern, pattern_field
from ..errors import RecipeError
from .base import Branch, Tensor
from .inits import normal, zeros

INITS = (True, False, "gaussian", "kaiming_uniform", "xavier_uniform")


@dataclass(frozen=True)
class C3AConfig(AdapterConfig):
    peft_type = "C3A"
    absent = LORA_ONLY | {"exclude_modules"}

    block_size: int = 256
    block_size_pattern: dict = pattern_field()
    init_weights: bool | str = "xavier_uniform"

    def __post_init__(self):
        super().__post_init__()
        sizes = {f"block_size_pattern[{k!r}]": v for k, v in self.block_size_pattern.items()}
        for what, size in {"block_size": self.block_size, **sizes}.items():
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise RecipeError(f"{what}: expected a positive integer, got {size!r}; nearest valid: 1")
        if self.init_weights not in INITS:
            raise RecipeError(f"init_weights={self.init_weights!r}: expected one of {INITS}")


class C3A(Branch):
    name = "C3A"
    Config = C3AConfig
    refuses = {"norm": "C3A's blocks are parts of a matrix; this weight has shape {shape}"}

    def block_size(self, target, config) -> int:
        return by_pattern(config.block_size_pattern, target.pattern_path, config.block_size)

    def check(self, target, config):
        (m, n), q = sizes(target), self.block_size(target, config)
        if m % q or n % q:
            common = math.gcd(m, n)
            valid = min((d for d in range(1, common + 1) if common % d == 0), key=lambda d: abs(d - q))
            return f"block_size={q} must divide the weight's {m} rows and {n} columns; nearest valid: {valid}"
        return None

    def tensors(self, target, config):
        (m, n), q = sizes(target), self.block_size(target, config)
        experts = (target.experts,) if target.experts else ()
        starts = {True: zeros, "gaussian": normal, "kaiming_uniform": partial(uniform, n**-0.5)}
        start = starts.get(config.init_weights, partial(uniform, math.sqrt(6 / (m + n))))  # Xavier
        return {"c3a_kernel": Tensor((*experts, m // q, n // q, q), start, "c3a_kernel")}

    def neutral(self, target, config):
        return {"c3a_kernel": 0.0}

    def delta(self, x, theta, target, config):
        k = theta["c3a_kernel"]
        q = k.shape[-1]
        wide = torch.promote_types(x.dtype, torch.float32)  # transforms have no half precision
        X, K = torch.fft.rfft(x.to(wide).unflatten(-1, (-1, q))), torch.fft.rfft(k.to(wide))
        return torch.fft.irfft(torch.einsum("...ef,aef->...af", X, K.conj()), n=q).flatten(-2) / x.shape[-1]

    def weight(self, W, b, theta, target, config):
        k = theta["c3a_kernel"]
        s = k.new_ones(k.shape[-1], dtype=torch.int64).cumsum(0)
        D = k[..., (s - s.unsqueeze(-1)) % k.shape[-1]].transpose(-3, -2)  # (a, e, t, s) -> (a, t, e, s)
        return W + D.reshape(W.shape) / (k.shape[-2] * k.shape[-1]), b


def sizes(target) -> tuple[int, int]:
    """Rows and columns of the weight, of one expert."""
    m = target.out_features
    return m, math.prod(target.shape) // ((target.experts or 1) * m)


def uniform(bound, tensor, W=None):
    init.uniform_(tensor, -bound, bound)
