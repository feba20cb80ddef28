"""LoHa: Low-rank Hadamard product (FedPara, Hyeon-Woo et al. 2021, arXiv 2108.06098; LyCORIS, arXiv 2309.14859).

    W' = W + s (A1 B1) * (A2 B2)        s = alpha / r;  A: (out, r), B: (r, in / groups * kernel)

use_effective_conv2d (Proposition 3 of FedPara), on kernels larger than one:
    W' = W + s P1 * P2,  P[p, q, *k] = sum_ij T[i, j, *k] A[i, p] B[j, q]    T: (r, r, *kernel), A: (r, out), B: (r, in / groups)

Starts as the identity (B2 = 0). PEFT has linear weights, Conv1d and Conv2d; there the update of a convolution ignores
padding_mode, and the gradient of A1 in the effective form takes the other product's core in place of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

from .base import Rewrite, Tensor
from .inits import constant, each, kaiming, zeros
from .lycoris import Lycoris, LycorisConfig, core_shape, with_core


@dataclass(frozen=True)
class LoHaConfig(LycorisConfig):
    peft_type = "LOHA"

    init_weights: bool = True


class LoHa(Lycoris, Rewrite):
    name = "LOHA"
    Config = LoHaConfig

    def neutral(self, target, config):
        return {"hada_w2_b": 0.0}

    def tensors(self, target, config):
        r, m = self.rank(target, config), target.out_features
        experts, n = target.shape[:-2] if target.experts else (), math.prod(target.shape[-1 - len(target.kernel) :])
        core = self.effective(target, config)
        a, b = ((r, m), (r, target.shape[1])) if core else ((*experts, m, r), (*experts, r, n))
        grow_a, grow_b = ((len(a) - (2 if core else 1), 1),), ((len(b) - 2, 1),)
        spec = {"scaling": Tensor((), partial(constant, self.scaling(target, config)), trainable=False)}
        for i in "12":
            start = partial(each, kaiming) if experts else kaiming
            last = zeros if i == "2" and config.init_weights else start
            spec[f"hada_w{i}_a"] = Tensor(a, start, f"hada_w{i}_a", pad=grow_a)
            spec[f"hada_w{i}_b"] = Tensor(b, last, f"hada_w{i}_b", pad=grow_b)
            if core:
                t = core_shape(r, target)
                spec[f"hada_t{i}"] = Tensor(t, kaiming, f"hada_t{i}", pad=((0, 1), (1, 1)))
        return spec

    def update(self, theta, target, config):
        factors = [(theta[f"hada_w{i}_a"], theta[f"hada_w{i}_b"]) for i in "12"]
        if self.effective(target, config):
            P1, P2 = (with_core(theta[f"hada_t{i}"], a, b) for i, (a, b) in zip("12", factors, strict=True))
        else:
            P1, P2 = (a @ b for a, b in factors)
        return theta["scaling"] * P1 * P2
