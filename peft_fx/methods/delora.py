"""DeLoRA: Decoupling Angles and Strength in Low-rank Adaptation (Bini et al. 2025, arXiv 2503.18225).

    W' = W + lambda / r * B diag(1 / (max(|A_i|, 1e-4) max(|B^i|, 1e-4))) A diag(w)

A: (r, n, *kernel), rows A_i; B: (m, r), columns B^i; lambda: (1,), trained; w: (n, *kernel), norms of W's columns when the
adapter was made, constant, saved. Starts as the identity (B = 0), except with init_weights=False. PEFT's module_dropout is
an ordinary dropout of the input; token ids cannot be dropped out, so that it has no effect on embeddings.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from torch.linalg import vector_norm

from ..config import LORA_ONLY, AdapterConfig, by_pattern, check_rank, pattern_field
from ..errors import RecipeError
from .base import Additive, Factors, Tensor
from .inits import constant, kaiming, zeros
from .shapes import experts, per_expert

SMALLEST = 1e-4


@dataclass(frozen=True)
class DeloraConfig(AdapterConfig):
    peft_type = "DELORA"
    absent = LORA_ONLY

    r: int = 8
    delora_lambda: float = 15
    module_dropout: float = 0.0
    init_weights: bool = True
    rank_pattern: dict = pattern_field()
    lambda_pattern: dict = pattern_field()

    def __post_init__(self):
        super().__post_init__()
        for what, rank in {"r": self.r, **{f"rank_pattern[{k!r}]": v for k, v in self.rank_pattern.items()}}.items():
            check_rank(what, rank)
        if not 0.0 <= self.module_dropout < 1.0:
            raise RecipeError(f"module_dropout: expected 0 <= p < 1, got {self.module_dropout!r}")

    def with_rank(self, rank):
        return replace(self, r=rank, rank_pattern={})


class DeLoRA(Additive):
    name = "DELORA"
    Config = DeloraConfig
    refuses = {"norm": "DeLoRA's factors need a matrix; name the norm in modules_to_save to train it whole"}

    def check(self, target, config):
        if target.groups > 1:
            return f"DeLoRA scales whole columns, which groups={target.groups} cut into parts; nearest valid: groups=1"
        return None

    def rank(self, target, config) -> int:
        return by_pattern(config.rank_pattern, target.pattern_path, config.r)

    def dropout(self, config):
        return config.module_dropout

    def tensors(self, target, config):
        r, E = self.rank(target, config), experts(target)
        strength = by_pattern(config.lambda_pattern, target.pattern_path, config.delora_lambda)
        inputs = (target.in_features, *target.kernel)
        rows, columns = len(E), len(E) + 1
        drawn = per_expert(kaiming, target)
        return {
            "delora_A": Tensor((*E, r, *inputs), drawn, "delora_A", pad=((rows, 1),)),
            "delora_B": Tensor(
                (*E, target.out_features, r),
                zeros if config.init_weights else drawn,
                "delora_B",
                pad=((columns, 1),),
            ),
            "delora_lambda": Tensor((1,), partial(constant, float(strength)), "delora_lambda"),
            "delora_w_norm": Tensor(
                (*E, *inputs), partial(column_norms, len(E)), "delora_w_norm", trainable=False
            ),
            "scaling": Tensor((), partial(constant, 1 / r), trainable=False),
        }  # fmt: skip

    def neutral(self, target, config):
        return {"delora_B": 0.0}

    def factors(self, theta, target, config):
        A, B, w = theta["delora_A"], theta["delora_B"], theta["delora_w_norm"]
        flat = A.flatten(1) if target.kernel else A
        lengths = vector_norm(flat, dim=-1).clamp(min=SMALLEST) * vector_norm(B, dim=-2).clamp(min=SMALLEST)
        B = B * (theta["delora_lambda"] / lengths).unsqueeze(-2)
        return Factors(A * w.unsqueeze(-2 - len(target.kernel)), B, theta["scaling"])


def column_norms(axis, tensor, W):
    tensor.copy_(vector_norm(W, dim=axis))
