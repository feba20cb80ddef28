"""LoKr: Low-rank Kronecker product (LyCORIS, Yeh et al. 2023, arXiv 2309.14859; FedPara, arXiv 2108.06098).

    W' = W + s kron(w1, w2)             s = alpha / r, also where nothing has rank r
    y  = W x + s (w1 X w2ᵀ),            X: x as a matrix (c, d)

out = l k and in / groups = c d by decompose_factor; w1: (l, c), w2: (k, d * kernel). Either is a product of rank r where that is
small enough: w1 = w1_a w1_b (decompose_both and r < max(l, c) / 2), w2 = w2_a w2_b (r < max(k, d) / 2), or with
use_effective_conv2d, on kernels larger than one, w2[p, q, *h] = sum_ij t2[i, j, *h] w2_a[i, p] w2_b[j, q].

Starts as the identity (w1 = 0; init_weights="lycoris": w2 = 0). PEFT has linear weights, Conv1d and Conv2d; there the update
ignores padding_mode, and the effective form of Conv1d raises. Conv1d with a whole w2 is PEFT's to the letter: kron of a matrix
and a 3-d tensor, reshaped, which is not the Kronecker product tap by tap.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..fields import one_of
from .base import Tensor
from .inits import kaiming, zeros
from .lycoris import Lycoris, LycorisConfig, core_shape, with_core
from .scales import fixed
from .shapes import factorization

# init_weights -> what of it starts at zero
AT_ZERO: dict[object, tuple[str, ...]] = {
    True: ("lokr_w1", "lokr_w1_a"),
    "lycoris": ("lokr_w2", "lokr_w2_b"),
    False: (),
}

Shapes = dict[str, tuple[tuple[int, ...], tuple[tuple[int, int], ...]]]  # tensor -> its shape, and its `pad`


@dataclass
class LoKrConfig(LycorisConfig):
    peft_type = "LOKR"

    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False  # type: ignore[misc]  # LoHa has no choice
    init_weights: bool | str = one_of(True, False, "lycoris")


class LoKr(Lycoris):
    name = "LOKR"
    Config = LoKrConfig
    off = {"lokr_w1": 0.0, "lokr_w1_a": 0.0}

    def tensors(self, target, config):
        r, kernel, factor = self.rank(target, config), target.kernel, config.decompose_factor
        (l, k), (c, d) = (factorization(size, factor) for size in (target.out_features, target.shape[1]))
        row, column = ((0, 1),), ((1, 1),)  # where the rank is
        w1: Shapes = {"lokr_w1": ((l, c), ())}
        w2: Shapes = {"lokr_w2": ((k, d, *kernel), ())}
        if config.decompose_both and r < max(l, c) / 2:
            w1 = {"lokr_w1_a": ((l, r), column), "lokr_w1_b": ((r, c), row)}
        if r < max(k, d) / 2:
            w2 = {"lokr_w2_a": ((k, r), column), "lokr_w2_b": ((r, d * math.prod(kernel)), row)}
            if self.effective(target, config):
                w2 = {"lokr_w2_a": ((r, k), row), "lokr_w2_b": ((r, d), row)}
                w2["lokr_t2"] = (core_shape(r, target), row + column)
        start = dict.fromkeys(AT_ZERO[config.init_weights], zeros)
        spec = {name: Tensor(s, start.get(name, kaiming), name, pad=pad) for name, (s, pad) in (w1 | w2).items()}
        return {"scaling": fixed(self.scaling(target, config))} | spec

    def pair(self, theta, target):
        """w1 and w2, the latter (k, d * kernel), or 3-d where PEFT's quirk needs it."""
        w1 = theta["lokr_w1"] if "lokr_w1" in theta else theta["lokr_w1_a"] @ theta["lokr_w1_b"]
        if "lokr_w2" in theta:
            return w1, theta["lokr_w2"].flatten(1) if len(target.kernel) > 1 else theta["lokr_w2"]
        a, b = theta["lokr_w2_a"], theta["lokr_w2_b"]
        return w1, with_core(theta["lokr_t2"], a, b).flatten(1) if "lokr_t2" in theta else a @ b

    def update(self, theta, target, config):
        return theta["scaling"] * torch.kron(*self.pair(theta, target))

    def delta(self, x, theta, target, config):
        w1, w2 = self.pair(theta, target)
        y = theta["scaling"] * (w1 @ (x.unflatten(-1, (w1.shape[-1], -1)) @ w2.mT)).flatten(-2)
        return self.dropped(y, target, config)
