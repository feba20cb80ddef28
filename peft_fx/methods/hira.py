"""HiRA: Hadamard high-rank adaptation (Huang et al. 2025, ICLR, openreview TwJrTz9cRS).

    W' = W * (1 + B A)        A: (r, in / groups, *kernel), B: (out, r)

No scale. Starts as the identity (B = 0; on embeddings A = 0, B normal); init_weights=False draws both normal. Experts: one
pair each. PEFT refuses grouped convolutions, where the same formula holds, and its update of a convolution ignores
padding_mode; it ignores rank_pattern too, so that files with that field only fit where they were written. hira_dropout, on
the update's input, takes a second product with the dense W * B A, y = W x + (W * B A) dropout(x), and is for linear weights;
on embeddings it has no effect, as in PEFT.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from ..config import LORA_ONLY, AdapterConfig, by_pattern, check_rank, pattern_field
from ..errors import RecipeError
from .base import Branch, Rewrite, Tensor
from .inits import each, kaiming, normal, scaled_normal, zeros

INITS = (True, False, "gaussian")


@dataclass(frozen=True)
class HiraConfig(AdapterConfig):
    peft_type = "HIRA"
    absent = LORA_ONLY | {"bias"}

    r: int = 32
    hira_dropout: float = 0.0
    fan_in_fan_out: bool = False
    init_weights: bool | str = True
    rank_pattern: dict = pattern_field()

    def __post_init__(self):
        super().__post_init__()
        for what, rank in {"r": self.r, **{f"rank_pattern[{k!r}]": v for k, v in self.rank_pattern.items()}}.items():
            check_rank(what, rank)
        if not 0.0 <= self.hira_dropout < 1.0:
            raise RecipeError(f"hira_dropout: expected 0 <= p < 1, got {self.hira_dropout!r}")
        if self.init_weights not in INITS:
            raise RecipeError(f"init_weights={self.init_weights!r}: expected one of {INITS}")

    def with_rank(self, rank):
        return replace(self, r=rank, rank_pattern={})


class HiRA(Rewrite):
    name = "HIRA"
    refuses = {"norm": "HiRA factors matrices; this weight has shape {shape}"}
    Config = HiraConfig

    NAMES = {"embedding": ("hira_embedding_A", "hira_embedding_B")}
    ZERO_FIRST = frozenset({"embedding"})

    def at(self, target, config):
        return HiRADropout() if config.hira_dropout and target.kind == "linear" else self

    def names(self, target):
        return self.NAMES.get(target.kind, ("hira_A", "hira_B"))

    def check(self, target, config):
        if config.hira_dropout and target.kind not in ("linear", "embedding"):
            return f"hira_dropout={config.hira_dropout} needs kind linear, this is {target.kind}; set it to 0"
        return None

    def tensors(self, target, config):
        r = by_pattern(config.rank_pattern, target.pattern_path, config.r)
        experts = target.shape[:1] if target.experts else ()
        A, B = (*experts, r, *target.shape[len(experts) + 1 :]), (*experts, target.out_features, r)
        name_A, name_B = self.names(target)
        start = {
            True: (kaiming, zeros),
            "gaussian": (kaiming if target.kernel else partial(scaled_normal, 1 / r), zeros),
            False: (normal, normal),
        }[config.init_weights]
        if target.kind in self.ZERO_FIRST and config.init_weights:
            start = zeros, normal
        init_A, init_B = (partial(each, i) for i in start) if experts else start
        return {
            name_A: Tensor(A, init_A, name_A, pad=((len(experts), 1),)),
            name_B: Tensor((*B, *(1,) * len(target.kernel)), init_B, name_B, pad=((len(experts) + 1, 1),)),
        }

    def neutral(self, target, config):
        return {self.names(target)[1]: 0.0}

    def weight(self, W, b, theta, target, config):
        A, B = (theta[name] for name in self.names(target))
        if target.kernel:
            A, B = A.flatten(1), B.flatten(1)
        return W + W * (B @ A).reshape(W.shape), b


class HiRADropout(HiRA, Branch):
    name = "HIRA_DROPOUT"
    reads_weight = True

    def dropout(self, config):
        return config.hira_dropout

    def delta(self, x, theta, target, config):
        A, B = (theta[name] for name in self.names(target))
        return x @ (theta["W"] * (B @ A)).mT
