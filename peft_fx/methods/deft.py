"""DEFT: Decompositional Efficient Fine-Tuning (2025, NeurIPS); with para=True PaRa, Parameter Rank Reduction (2025, ICLR).

    W' = (I - Q Zᵀ) W + s Q R        s = alpha / r', 1 without alpha; r' = min(r, m)
    y' = y + Q (s R dropout(x) - Zᵀ W x)
    relu: Q = P, Z = relu(P)         qr: Q = Z = qr(P).Q              P: (m, r'), R: (r', n); no R with para

On convolutions W is the matrix (m, patch). Starts as the identity, R = Zᵀ W / s, except with init_weights=False or para.
Several adapters compose one after the other, where PEFT sums their changes of the base weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch

from ..config import LORA_ONLY, AdapterConfig
from ..fields import checked, one_of, probability, rank
from .base import HALF, Branch, Tensor
from .inits import scaled_normal
from .matrices import row_size
from .scales import fixed

STD = 0.02


@dataclass
class DeftConfig(AdapterConfig):
    peft_type = "DEFT"
    absent = LORA_ONLY
    ranked = "r"

    r: int = rank(8)
    decomposition_method: str = one_of("relu", "qr")
    init_scale: float = 1.0
    alpha: int | None = checked(None, math.isfinite, "a number")
    para: bool = False
    fan_in_fan_out: bool = False
    deft_dropout: float = probability()
    init_weights: bool = True


class DEFT(Branch):
    name = "DEFT"
    Config = DeftConfig
    refuses = {"norm": "DEFT projects a matrix; name the norm in modules_to_save to train it whole"}
    drops = "deft_dropout"
    reads = ("y",)
    written = ("decomposition_method",)
    one_size = "the orthogonal columns that qr makes of zeros would project the weight"

    def dropout(self, config):
        return 0.0 if config.para else super().dropout(config)

    def tensors(self, target, config):
        r = min(config.r, target.out_features)
        s = config.alpha / r if config.alpha else 1.0
        padded = config.decomposition_method == "relu"
        P = Tensor((target.out_features, r), partial(scaled_normal, STD), "deft_P", pad=((1, 1),) if padded else ())
        if config.para:
            return {"deft_P": P}
        R = Tensor(
            (r, row_size(target)), partial(inject, config, s), "deft_R", needs=("deft_P",), pad=P.pad and ((0, 1),)
        )
        return {"deft_P": P, "deft_R": R, "scaling": fixed(s)}

    def neutral(self, target, config):
        return {"deft_P": 0.0} if config.decomposition_method == "relu" else None

    def delta(self, x, theta, target, config):
        Q, Z = projection(theta["deft_P"], config)
        added = 0 if config.para else (x @ theta["deft_R"].mT) * theta["scaling"]
        return (added - theta["y"] @ Z) @ Q.mT

    def weight(self, W, b, theta, target, config):
        Q, Z = projection(theta["deft_P"], config)
        added = theta["scaling"] * theta["deft_R"] if "deft_R" in theta else 0
        return W + (Q @ (added - Z.mT @ W.flatten(1))).reshape(W.shape), b

    def undropped(self, W, b, theta, target, config):
        return self.weight(W, b, {"deft_P": theta["deft_P"]}, target, config)


def projection(P, config):
    """Q and Z of the projection Q Zᵀ."""
    if config.decomposition_method == "relu":
        return P, P.relu()
    Q = torch.linalg.qr(P.float() if P.dtype in HALF else P).Q.to(P.dtype)  # there is none in half precision
    return Q, Q


def inject(config, s, R, W, P):
    if not config.init_weights:
        return scaled_normal(STD * config.init_scale, R)
    _, Z = projection(P.to(R.dtype), config)
    return R.copy_(Z.mT @ W.flatten(1).to(R.dtype) / s)
