"""PEANuT: Parameter-Efficient Adaptation with Weight-aware Neural Tweakers (Zhong et al. 2024, arXiv 2410.01870).

    W' = W + s (f(Wᵀ) Bᵀ)ᵀ        f(V): Z_0 = act(V Aᵀ); Z_i = act(Z_{i-1} E_iᵀ), i = 1 .. depth;
                                        then Z <- act(Z D_jᵀ) + Z_{depth - j}, j = 1 .. depth

A: (r, m), B: (m, r), encoders E_i and decoders D_j: (r, r). A small network over W's columns: the weight is rewritten. On
convolutions the columns are those of (m, patch). Starts as the identity (B = 0), except with init_weights=False. Several
adapters compose one after the other, where PEFT feeds the base weight to each.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from transformers.activations import ACT2FN

from ..config import LORA_ONLY, AdapterConfig, check_rank
from ..errors import RecipeError
from .base import Rewrite, Tensor
from .inits import constant, kaiming, zeros
from .shapes import as_matrix, experts, per_expert

TRAINED = ("prelu", "xielu")  # activations with parameters, for which the file has no place
ACTIVATIONS = sorted(set(ACT2FN) - set(TRAINED))
MAX_DEPTH = 1024  # a file that asks for more is damaged or hostile


@dataclass(frozen=True)
class PeanutConfig(AdapterConfig):
    peft_type = "PEANUT"
    absent = LORA_ONLY | {"bias"}

    r: int = 32
    depth: int = 0
    act_fn: str = "relu"
    scaling: float = 1.0
    init_weights: bool = True

    def __post_init__(self):
        super().__post_init__()
        check_rank("r", self.r)
        if not 0 <= self.depth <= MAX_DEPTH:
            raise RecipeError(f"depth: expected 0 <= depth <= {MAX_DEPTH}, got {self.depth!r}")
        if self.act_fn not in ACTIVATIONS:
            raise RecipeError(f"act_fn={self.act_fn!r}: expected one of {', '.join(ACTIVATIONS)}")


class PEANuT(Rewrite):
    name = "PEANUT"
    Config = PeanutConfig
    refuses = {"norm": "PEANuT reads the columns of a matrix; name the norm in modules_to_save to train it whole"}

    def check(self, target, config):
        if target.groups > 1:
            return f"PEANuT mixes output channels, which groups={target.groups} keep apart; nearest valid: groups=1"
        return None

    def tensors(self, target, config):
        E, m, r = experts(target), target.out_features, config.r
        drawn = per_expert(kaiming, target)
        spec = {
            "peanut_A": Tensor((*E, r, m), drawn, "peanut_A.weight"),
            "peanut_B": Tensor((*E, m, r), zeros if config.init_weights else drawn, "peanut_B.weight"),
            "scaling": Tensor((), partial(constant, config.scaling), trainable=False),
        }
        for part in ("peanut_encoders", "peanut_decoders"):
            for i in range(config.depth):
                spec[f"{part}_{i}"] = Tensor((*E, r, r), drawn, f"{part}.{i}.weight")
        return spec

    def literals(self, target, config):
        return (config.act_fn,)

    def neutral(self, target, config):
        return {"peanut_B": 0.0}

    def weight(self, W, b, theta, target, config):
        act, flat = ACT2FN[config.act_fn], as_matrix(W, target)
        Z = [act(flat.mT @ theta["peanut_A"].mT)]
        for i in range(config.depth):
            Z.append(act(Z[i] @ theta[f"peanut_encoders_{i}"].mT))
        result = Z.pop()
        for i in range(config.depth):
            result = act(result @ theta[f"peanut_decoders_{i}"].mT) + Z.pop()
        return (flat + theta["scaling"] * (theta["peanut_B"] @ result.mT)).reshape(W.shape), b
