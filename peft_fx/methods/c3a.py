"""C3A: Circular Convolution Adaptation (Chen et al. 2024, arXiv 2407.19342).

    W' = W + D / in,   block (a, e) of D is circulant: D_ae[t, s] = k[a, e, (s - t) mod q]        k: (out / q, in / q, q)
    y  = W x + irfft(sum_e conj(rfft(k_ae)) rfft(x_e)) / in        q = block_size

Not the identity at the start, unless init_weights is True. Convolutions: the weight is the matrix (out, rest). PEFT has
nn.Linear only, reverses the kernel in the gradient with respect to x, and gives a second active adapter the output of the
first instead of the input.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from ..checks import check_rank
from ..config import LORA_ONLY, AdapterConfig, by_pattern
from ..fields import one_of, pattern_field, rank
from ..kernels.circulant import circulant
from .base import Branch, Tensor
from .inits import normal, uniform, zeros
from .matrices import row_size
from .shapes import nearest_divisor


@dataclass
class C3AConfig(AdapterConfig):
    peft_type = "C3A"
    absent = LORA_ONLY | {"exclude_modules"}

    block_size: int = rank(256)
    block_size_pattern: dict = pattern_field()
    init_weights: bool | str = one_of("xavier_uniform", True, False, "gaussian", "kaiming_uniform")

    def __post_init__(self):
        super().__post_init__()
        for key, size in self.block_size_pattern.items():
            check_rank(f"block_size_pattern[{key!r}]", size)


class C3A(Branch):
    name = "C3A"
    Config = C3AConfig
    one_size = "block_size says which features a kernel turns together"
    refuses = {"norm": "C3A's blocks are parts of a matrix; this weight has shape {shape}"}
    off = {"c3a_kernel": 0.0}

    def block_size(self, target, config) -> int:
        return by_pattern(config.block_size_pattern, target.pattern_path, config.block_size)

    def check(self, target, config):
        m, n, q = target.out_features, row_size(target), self.block_size(target, config)
        if m % q or n % q:
            valid = nearest_divisor(q, math.gcd(m, n))
            return f"block_size={q} must divide the weight's {m} rows and {n} columns; nearest valid: {valid}"
        return None

    def tensors(self, target, config):
        m, n, q = target.out_features, row_size(target), self.block_size(target, config)
        starts: dict[object, Callable] = {True: zeros, "gaussian": normal, "kaiming_uniform": partial(uniform, n**-0.5)}
        start = starts.get(config.init_weights, partial(uniform, math.sqrt(6 / (m + n))))  # Xavier
        return {"c3a_kernel": Tensor((m // q, n // q, q), start, "c3a_kernel")}

    def delta(self, x, theta, target, config):
        return circulant(x, theta["c3a_kernel"]) / x.shape[-1]

    def weight(self, W, b, theta, target, config):
        k = theta["c3a_kernel"]
        _, blocks, q = k.shape
        s = k.new_ones(q, dtype=torch.int64).cumsum(0)
        D = k.index_select(-1, ((s - s.unsqueeze(-1)) % q).flatten()).unflatten(-1, (q, q))  # (a, e, t, s)
        return W + D.transpose(1, 2).reshape(W.shape) / (blocks * q), b
