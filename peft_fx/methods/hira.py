"""HiRA: Hadamard high-rank adaptation (Huang et al. 2025, ICLR, openreview TwJrTz9cRS).

    W' = W * (1 + B A)                       A: (r, in / groups, *kernel), B: (out, r)
    y  = W x + (W * B A) dropout(x)

No scale. Starts as the identity (B = 0; on embeddings A = 0, B normal); init_weights=False draws both normal. PEFT refuses
grouped convolutions, where the same formula holds, and its update of a convolution ignores padding_mode; it ignores
rank_pattern too, so that files with that field only fit where they were written. As in PEFT, token ids cannot be dropped out:
on embeddings hira_dropout has no effect.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from ..checks import check_rank
from ..config import LORA_ONLY, AdapterConfig, by_pattern
from ..fields import one_of, pattern_field, probability, rank
from .base import Rewrite, Tensor
from .inits import drawn_after, kaiming, normal, scaled_normal, zeros


@dataclass
class HiraConfig(AdapterConfig):
    peft_type = "HIRA"
    absent = LORA_ONLY | {"bias"}
    ranked = "r"

    r: int = rank(32)
    hira_dropout: float = probability(0.0)
    fan_in_fan_out: bool = False
    init_weights: bool | str = one_of(True, False, "gaussian")
    rank_pattern: dict = pattern_field(check_rank)


class HiRA(Rewrite):
    name = "HIRA"
    refuses = {"norm": "HiRA factors matrices; this weight has shape {shape}"}
    Config = HiraConfig
    drops = "hira_dropout"

    # operator kind -> names of A and B
    NAMES = {"embedding": ("hira_embedding_A", "hira_embedding_B")}
    ZERO_FIRST = frozenset({"embedding"})  # operator kinds where A starts at zero and B normal

    def names(self, target):
        return self.NAMES.get(target.kind, ("hira_A", "hira_B"))

    def tensors(self, target, config):
        r = by_pattern(config.rank_pattern, target.pattern_path, config.r)
        start = {
            True: (kaiming, zeros),
            "gaussian": (kaiming if target.kernel else partial(scaled_normal, 1 / r), zeros),
            False: (normal, normal),
        }[config.init_weights]
        if target.kind in self.ZERO_FIRST and config.init_weights:
            start = zeros, normal
        A, B = (r, *target.shape[1:]), (target.out_features, r, *(1,) * len(target.kernel))
        start_A = partial(drawn_after, normal, (A, B), start[0]) if config.init_weights else start[0]
        name_A, name_B = self.names(target)
        return {
            name_A: Tensor(A, start_A, name_A, pad=((0, 1),)),
            name_B: Tensor(B, start[1], name_B, pad=((1, 1),)),
        }

    def neutral(self, target, config):
        return {self.names(target)[1]: 0.0}

    def weight(self, W, b, theta, target, config):
        A, B = (theta[name].flatten(1) for name in self.names(target))
        return W + W * (B @ A).reshape(W.shape), b
