"""DEFT: Decompositional Efficient Fine-Tuning (2025, NeurIPS); with para=True PaRa, Parameter Rank Reduction (2025, ICLR).

    W' = (I - Q Zᵀ) W + s Q R        s = alpha / r', 1 without alpha; r' = min(r, m)
    relu: Q = P, Z = relu(P)         qr: Q = Z = qr(P).Q              P: (m, r'), R: (r', n); no R with para

The removal depends on W: the weight is rewritten. On convolutions it is flattened to (m, patch). R starts as Zᵀ W / s, so that
nothing changes; not so with init_weights=False, nor with para. Several adapters compose one after the other, where PEFT sums
their changes of the base weight. deft_dropout is refused: it drops the input of s Q R alone, which has no product of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from ..config import LORA_ONLY, AdapterConfig, check_rank
from ..errors import RecipeError
from .base import Rewrite, Tensor
from .inits import constant, scaled_normal
from .shapes import as_matrix, columns, experts

PROJECTIONS = ("relu", "qr")
STD = 0.02


@dataclass(frozen=True)
class DeftConfig(AdapterConfig):
    peft_type = "DEFT"
    absent = LORA_ONLY
    refused = {
        "deft_dropout": "the weight is rewritten, there is no product whose input could be dropped out; set it to 0"
    }

    r: int = 8
    decomposition_method: str = "relu"
    init_scale: float = 1.0
    alpha: int | None = None
    para: bool = False
    fan_in_fan_out: bool = False
    deft_dropout: float = 0.0
    init_weights: bool = True

    def __post_init__(self):
        super().__post_init__()
        check_rank("r", self.r)
        if self.decomposition_method not in PROJECTIONS:
            raise RecipeError(f"decomposition_method={self.decomposition_method!r}: expected one of {PROJECTIONS}")
        if not isinstance(self.alpha, (int, float, type(None))):
            raise RecipeError(f"alpha: expected a number or None, got {self.alpha!r}")


class DEFT(Rewrite):
    name = "DEFT"
    Config = DeftConfig
    refuses = {"norm": "DEFT projects a matrix; name the norm in modules_to_save to train it whole"}

    def check(self, target, config):
        if target.groups > 1:
            return f"DEFT mixes output channels, which groups={target.groups} keep apart; nearest valid: groups=1"
        return None

    def tensors(self, target, config):
        r = min(config.r, target.out_features)
        s = config.alpha / r if config.alpha else 1.0
        P = Tensor((*experts(target), target.out_features, r), partial(scaled_normal, STD), "deft_P")
        if config.para:
            return {"deft_P": P}
        shape = (*experts(target), r, columns(target))
        if config.init_weights:
            R = Tensor(shape, partial(cancel, target, config, s), "deft_R", needs=("deft_P",))
        else:
            R = Tensor(shape, partial(scaled_normal, STD * config.init_scale), "deft_R")
        return {"deft_P": P, "deft_R": R, "scaling": Tensor((), partial(constant, s), trainable=False)}

    def literals(self, target, config):
        return (config.decomposition_method,)

    def neutral(self, target, config):
        return {"deft_P": 0.0} if config.decomposition_method == "relu" else None

    def weight(self, W, b, theta, target, config):
        flat, (Q, Z) = as_matrix(W, target), projection(theta["deft_P"], config)
        change = -(Z.mT @ flat)
        if not config.para:
            change = change + theta["scaling"] * theta["deft_R"]
        return (flat + Q @ change).reshape(W.shape), b


def projection(P, config):
    """Q and Z of the projection Q Zᵀ."""
    if config.decomposition_method == "relu":
        return P, P.relu()
    Q, _ = torch.linalg.qr(P)
    return Q, Q


def cancel(target, config, s, R, W, P):
    _, Z = projection(P.to(R.dtype), config)
    R.copy_(Z.mT @ as_matrix(W, target).to(R.dtype) / s)
