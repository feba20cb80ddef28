"""LoHa: Low-rank Hadamard product (FedPara, Hyeon-Woo et al. 2021, arXiv 2108.06098; LyCORIS, arXiv 2309.14859).

    W' = W + s (A1 B1) * (A2 B2)        s = alpha / r;  A: (out, r), B: (r, in / groups * kernel)
    y  = W x + s sum_ij A1_i * A2_j * ((B1_i * B2_j) · x)          the same as two factors of rank r²

use_effective_conv2d (Proposition 3 of FedPara), on kernels larger than one:
    W' = W + s P1 * P2,  P[p, q, *k] = sum_ij T[i, j, *k] A[i, p] B[j, q]    T: (r, r, *kernel), A: (r, out), B: (r, in / groups)

Starts as the identity (B2 = 0). PEFT has linear weights, Conv1d and Conv2d; there the update of a convolution ignores
padding_mode, and the gradient of A1 in the effective form takes the other product's core in place of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .base import Tensor
from .inits import kaiming, zeros
from .lycoris import Lycoris, LycorisConfig, core_shape, with_core
from .matrices import row_size
from .scales import fixed


@dataclass
class LoHaConfig(LycorisConfig):
    peft_type = "LOHA"

    init_weights: bool = True


class LoHa(Lycoris):
    name = "LOHA"
    Config = LoHaConfig
    off = {"hada_w2_b": 0.0}

    def tensors(self, target, config):
        r, m, core = self.rank(target, config), target.out_features, self.effective(target, config)
        a, b = ((r, m), (r, target.shape[1])) if core else ((m, r), (r, row_size(target)))
        spec = {"scaling": fixed(self.scaling(target, config))}
        for i in "12":
            last = zeros if i == "2" and config.init_weights else kaiming
            spec[f"hada_w{i}_a"] = Tensor(a, kaiming, f"hada_w{i}_a", pad=((0 if core else 1, 1),))
            spec[f"hada_w{i}_b"] = Tensor(b, last, f"hada_w{i}_b", pad=((0, 1),))
            if core:
                shape = core_shape(r, target)
                spec[f"hada_t{i}"] = Tensor(shape, kaiming, f"hada_t{i}", pad=((0, 1), (1, 1)))
        return spec

    def update(self, theta, target, config):
        factors = [(theta[f"hada_w{i}_a"], theta[f"hada_w{i}_b"]) for i in "12"]
        if self.effective(target, config):
            P1, P2 = (with_core(theta[f"hada_t{i}"], a, b) for i, (a, b) in zip("12", factors, strict=True))
        else:
            P1, P2 = (a @ b for a, b in factors)
        return theta["scaling"] * P1 * P2

    def delta(self, x, theta, target, config):
        A = torch.einsum("in,jn->ijn", theta["hada_w1_b"], theta["hada_w2_b"]).flatten(0, 1)
        B = torch.einsum("mi,mj->mij", theta["hada_w1_a"], theta["hada_w2_a"]).flatten(1)
        return self.dropped(theta["scaling"] * (x @ A.mT @ B.mT), target, config)
