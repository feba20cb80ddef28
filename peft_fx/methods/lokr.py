"""LoKr: Low-rank Kronecker product (LyCORIS, Yeh et al. 2023, arXiv 2309.14859; FedPara, arXiv 2108.06098).

    W' = W + s kron(w1, w2)             s = alpha / r, also where nothing has rank r
    y  = W x + s (w1 X w2ᵀ),            X: x as a matrix (c, d)

out = l k and in / groups = c d by decompose_factor; w1: (l, c), w2: (k, d * kernel). Either is a product of rank r where that is
small enough: w1 = w1_a w1_b (decompose_both and r < max(l, c) / 2), w2 = w2_a w2_b (r < max(k, d) / 2), or with
use_effective_conv2d, on kernels larger than one, w2[p, q, *h] = sum_ij t2[i, j, *h] w2_a[i, p] w2_b[j, q].

Starts as the identity (w1 = 0; init_weights="lycoris": w2 = 0). PEFT has linear weights, Conv1d and Conv2d; there the update
ignores padding_mode, and the effective form of Conv1d raises. Conv1d with a whole w2 follows PEFT's files to the letter: kron
of a matrix and a 3-d tensor, reshaped, which is not the Kronecker product tap by tap.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch

from ..errors import RecipeError
from .base import Branch, Tensor
from .inits import constant, each, kaiming, zeros
from .lycoris import Lycoris, LycorisConfig, core_shape, with_core

INITS = (True, False, "lycoris")


@dataclass(frozen=True)
class LoKrConfig(LycorisConfig):
    peft_type = "LOKR"

    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False
    init_weights: bool | str = True

    def __post_init__(self):
        super().__post_init__()
        if self.init_weights not in INITS:
            raise RecipeError(f"init_weights={self.init_weights!r}: expected one of {INITS}")


class LoKr(Lycoris, Branch):
    name = "LOKR"
    Config = LoKrConfig

    def literals(self, target, config):
        return *super().literals(target, config), config.rank_dropout_scale

    def mean_scaled(self, config):
        return config.rank_dropout_scale

    def neutral(self, target, config):
        return {self.split(target, config)[0][0]: 0.0}

    def split(self, target, config) -> tuple[tuple[str, ...], tuple[str, ...], tuple[int, int, int, int]]:
        """Names of the tensors of w1 and of w2, and (l, c, k, d)."""
        r, columns = self.rank(target, config), target.in_features // target.groups
        (l, k), (c, d) = (factorization(size, config.decompose_factor) for size in (target.out_features, columns))
        first = ("lokr_w1_a", "lokr_w1_b") if config.decompose_both and r < max(l, c) / 2 else ("lokr_w1",)
        second = ("lokr_w2_a", "lokr_w2_b") if r < max(k, d) / 2 else ("lokr_w2",)
        if len(second) == 2 and self.effective(target, config):
            second = (*second, "lokr_t2")
        return first, second, (l, c, k, d)

    def tensors(self, target, config):
        first, second, (l, c, k, d) = self.split(target, config)
        r, kernel = self.rank(target, config), target.kernel
        E = target.shape[:1] if target.experts else ()
        row, column = ((len(E), 1),), ((len(E) + 1, 1),)
        core = len(second) == 3
        described = {
            "lokr_w1": ((*E, l, c), ()),
            "lokr_w1_a": ((*E, l, r), column),
            "lokr_w1_b": ((*E, r, c), row),
            "lokr_w2": ((*E, k, d, *kernel), ()),
            "lokr_w2_a": ((r, k), row) if core else ((*E, k, r), column),
            "lokr_w2_b": ((r, d), row) if core else ((*E, r, d * math.prod(kernel)), row),
            "lokr_t2": (core_shape(r, target), ((0, 1), (1, 1))),
        }
        start = partial(each, kaiming) if E else kaiming
        first_zero = {True: first[0], "lycoris": second[:2][-1], False: None}[config.init_weights]
        spec = {"scaling": Tensor((), partial(constant, self.scaling(target, config)), trainable=False)}
        for name in (*first, *second):
            shape, pad = described[name]
            spec[name] = Tensor(shape, zeros if name == first_zero else start, name, pad=pad)
        return spec

    def pair(self, theta, target, config):
        """w1 and w2, the latter (k, d * kernel), or 3-d where PEFT's quirk needs it."""
        first, second, _ = self.split(target, config)
        w1 = theta[first[0]] if len(first) == 1 else theta[first[0]] @ theta[first[1]]
        if len(second) == 3:
            return w1, with_core(theta["lokr_t2"], theta["lokr_w2_a"], theta["lokr_w2_b"]).flatten(1)
        if len(second) == 2:
            return w1, theta["lokr_w2_a"] @ theta["lokr_w2_b"]
        w2 = theta["lokr_w2"]
        return w1, w2.flatten(1) if len(target.kernel) > 1 else w2

    def update(self, theta, target, config):
        w1, w2 = self.pair(theta, target, config)
        if target.kernel and w2.dim() == 3:
            return theta["scaling"] * torch.kron(w1, w2)
        return theta["scaling"] * torch.einsum("...lc,...kd->...lkcd", w1, w2).flatten(-4, -3).flatten(-2)

    def delta(self, x, theta, target, config):
        w1, w2 = self.pair(theta, target, config)
        y = theta["scaling"] * (w1 @ (x.unflatten(-1, (w1.shape[-1], -1)) @ w2.mT)).flatten(-2)
        return self.dropped(y, target, config)


def factorization(size: int, factor: int) -> tuple[int, int]:
    """(factor, size / factor) if that divides, else the divisors closest to the root, the smaller one first and <= factor."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    largest = size if factor == -1 else factor
    small = max(i for i in range(1, math.isqrt(size) + 1) if size % i == 0 and i <= max(largest, 1))
    return small, size // small
