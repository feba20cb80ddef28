"""DeLoRA: Decoupling Angles and Strength in Low-rank Adaptation (Bini et al. 2025, arXiv 2503.18225).

    W' = W + lambda / r * B diag(1 / (max(|A_i|, 1e-4) max(|B^i|, 1e-4))) A diag(w)

A: (r, n, *kernel), rows A_i; B: (m, r), columns B^i; lambda: (1,), trained; w: (n, *kernel), norms of W's columns when the
adapter was made, constant, saved; n: the channels of one group. Starts as the identity (B = 0), except with
init_weights=False. PEFT's module_dropout is an ordinary dropout of the input; token ids cannot be dropped out, so that it has
no effect on embeddings.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch.linalg import vector_norm

from ..checks import check_rank
from ..config import LORA_ONLY, AdapterConfig, by_pattern
from ..fields import pattern_field, probability, rank
from .base import Tensor
from .inits import constant, kaiming, zeros
from .matrices import Matrices
from .scales import fixed

SMALLEST = 1e-4


@dataclass
class DeloraConfig(AdapterConfig):
    peft_type = "DELORA"
    absent = LORA_ONLY
    ranked = "r"

    r: int = rank(8)
    delora_lambda: float = 15
    module_dropout: float = probability()
    init_weights: bool = True
    rank_pattern: dict = pattern_field(check_rank)
    lambda_pattern: dict = pattern_field()


class DeLoRA(Matrices):
    name = "DELORA"
    Config = DeloraConfig
    refuses = {"norm": "DeLoRA's factors need a matrix; name the norm in modules_to_save to train it whole"}
    drops = "module_dropout"
    off = {"delora_B": 0.0}

    def tensors(self, target, config):
        r = by_pattern(config.rank_pattern, target.pattern_path, config.r)
        strength = by_pattern(config.lambda_pattern, target.pattern_path, config.delora_lambda)
        m, *row = target.shape
        B = zeros if config.init_weights else kaiming
        return {
            "delora_A": Tensor((r, *row), kaiming, "delora_A", pad=((0, 1),)),
            "delora_B": Tensor((m, r), B, "delora_B", pad=((1, 1),)),
            "delora_lambda": Tensor((1,), partial(constant, float(strength)), "delora_lambda"),
            "delora_w_norm": Tensor(tuple(row), column_norms, "delora_w_norm", trainable=False),
            "scaling": fixed(1 / r),
        }

    def matrices(self, theta, target, config):
        A, B = theta["delora_A"].flatten(1), theta["delora_B"]
        lengths = vector_norm(A, dim=1).clamp(min=SMALLEST) * vector_norm(B, dim=0).clamp(min=SMALLEST)
        return A * theta["delora_w_norm"].flatten(), B * (theta["scaling"] * theta["delora_lambda"] / lengths)


def column_norms(tensor, W):
    tensor.copy_(vector_norm(W, dim=0))
