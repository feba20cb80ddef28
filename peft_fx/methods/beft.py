"""BEFT: Bias-Efficient Fine-Tuning of Language Models in Low-Data Regimes (2025, arXiv 2509.15974).

    y = W x + b + v            v: (1, m), one number per output feature

Only a bias is trained; where the base has none it gets one, in the forward and in a merge (PEFT refuses that merge). On
embeddings v is added to every row; a norm needs a bias of its own. Starts as the identity, except with init_weights=False.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from ..config import LORA_ONLY, AdapterConfig
from .base import OutputMap, Tensor
from .inits import drawn_over, normal, zeros


@dataclass
class BeftConfig(AdapterConfig):
    peft_type = "BEFT"
    absent = LORA_ONLY | {"bias", "exclude_modules", "layers_pattern", "layers_to_transform"}

    init_weights: bool = True


class BEFT(OutputMap):
    name = "BEFT"
    Config = BeftConfig
    refuses = {"expert": "BEFT adds to a module's bias; experts in one parameter have none"}
    off = {"beft_bias": 0.0}

    def check(self, target, config):
        if len(target.shape) == 1 and not target.has_bias:
            return "BEFT adds to a bias, which this norm does not have; train its weight with LN_TUNING"
        return None

    def tensors(self, target, config):
        start = partial(drawn_over, normal, zeros) if config.init_weights else normal
        return {"beft_bias": Tensor((1, target.out_features), start, "beft_bias")}

    def map_output(self, y, theta, target, config):
        return y + theta["beft_bias"].flatten()

    def weight(self, W, b, theta, target, config):
        v = theta["beft_bias"].flatten()
        if target.reads_ids:  # a table has no bias: each token's column moves
            return W + v.unsqueeze(1), b
        return W, v if b is None else b + v
