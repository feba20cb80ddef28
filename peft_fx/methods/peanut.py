"""PEANuT: Parameter-Efficient Adaptation with Weight-aware Neural Tweakers (Zhong et al. 2024, arXiv 2410.01870).

    W' = W + s B f(Wᵀ)ᵀ        f(V): Z_0 = act(V Aᵀ); Z_i = act(Z_{i-1} E_iᵀ), i = 1 .. depth;
                                     then Z <- act(Z D_jᵀ) + Z_{depth - j}, j = 1 .. depth

A: (r, m), B: (m, r), encoders E_i and decoders D_j: (r, r). A small network over W's columns; on convolutions those of the
matrix (m, patch). Starts as the identity (B = 0), except with init_weights=False. Several adapters compose one after the
other, where PEFT feeds the base weight to each.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from transformers.activations import ACT2FN

from ..config import LORA_ONLY, AdapterConfig
from ..fields import checked, one_of, rank
from .base import Tensor
from .inits import drawn_after, kaiming, zeros
from .matrices import Matrices
from .scales import fixed

TRAINED = ("prelu", "xielu")  # activations with parameters, for which the file has no place
MAX_DEPTH = 1024  # a file that asks for more is damaged or hostile


@dataclass
class PeanutConfig(AdapterConfig):
    peft_type = "PEANUT"
    absent = LORA_ONLY | {"bias"}
    ranked = "r"

    r: int = rank(32)
    depth: int = checked(0, lambda depth: 0 <= depth <= MAX_DEPTH, f"0 to {MAX_DEPTH}")
    act_fn: str = one_of("relu", *sorted(set(ACT2FN) - {"relu", *TRAINED}))
    scaling: float = 1.0
    init_weights: bool = True


class PEANuT(Matrices):
    name = "PEANUT"
    Config = PeanutConfig
    refuses = {"norm": "PEANuT reads the columns of a matrix; name the norm in modules_to_save to train it whole"}
    reads = ("W",)
    written = ("act_fn",)
    one_size = "the activation of zero is not zero"
    off = {"peanut_B": 0.0}

    def tensors(self, target, config):
        m, r = target.out_features, config.r
        padded = not ACT2FN[config.act_fn](torch.zeros(())).any()  # else what is padded would learn
        rows, columns = (((0, 1),), ((1, 1),)) if padded else ((), ())
        start_A = partial(drawn_after, kaiming, ((r, m), *[(r, r)] * (2 * config.depth), (m, r)), kaiming)
        spec = {"peanut_A": Tensor((r, m), start_A, "peanut_A.weight", pad=rows)}
        for part in ("peanut_encoders", "peanut_decoders"):
            for i in range(config.depth):
                spec[f"{part}_{i}"] = Tensor((r, r), kaiming, f"{part}.{i}.weight", pad=rows + columns)
        return spec | {
            "peanut_B": Tensor((m, r), zeros if config.init_weights else kaiming, "peanut_B.weight", pad=columns),
            "scaling": fixed(config.scaling),
        }

    def matrices(self, theta, target, config):
        act = ACT2FN[config.act_fn]
        Z = [act(theta["W"].flatten(1).mT @ theta["peanut_A"].mT)]
        for i in range(config.depth):
            Z.append(act(Z[i] @ theta[f"peanut_encoders_{i}"].mT))
        result = Z.pop()
        for i in range(config.depth):
            result = act(result @ theta[f"peanut_decoders_{i}"].mT) + Z.pop()
        return result.mT, theta["scaling"] * theta["peanut_B"]
