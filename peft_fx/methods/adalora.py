"""AdaLoRA: Adaptive Budget Allocation (Zhang et al. 2023, arXiv 2303.10512).

    W' = W + s / (init_r + 1e-5) B diag(E) A        s = lora_alpha, or the rank where lora_alpha is 0
    A: (r, n / groups * kernel...), E: (r, 1), B: (out, r)

Starts as the identity (E = 0). Created with init_r components; training sets unimportant ones to zero, and `rank_pattern`
("<module>.lora_E" -> a boolean per component) says which ones a file holds. The scale does not follow the rank; LoRA's
field r has no meaning here.
Deviations from PEFT, which is wrong there: dilation and padding mode of a convolution apply to the update, and grouped
convolutions work (there: an error in the forward); fields of LoRA that AdaLoRA ignores in silence are refused.
Importance scores, budget and orthogonality are training, not adapter: peft_fx.training.adalora.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from torch.nn import functional as F

from ..config import AdapterConfig, check_rank
from ..errors import RecipeError
from .base import Tensor
from .inits import constant, normal, scaled_normal, zeros
from .lora import LoraConfig
from .matrices import Matrices, row_size

IGNORED = "AdaLoRA makes no use of it"


@dataclass(frozen=True)
class AdaLoraConfig(LoraConfig):
    peft_type = "ADALORA"
    refused = dict.fromkeys(
        ("use_rslora", "lora_bias", "alpha_pattern", "use_dora", "loftq_config", "velora_config", "use_qalora",
         "alora_invocation_tokens", "monteclora_config", "use_bdlora", "arrow_config", "kasa_config", "megatron_config",
         "eva_config", "corda_config", "lora_ga_config"), IGNORED
    )  # fmt: skip
    patterns = ()

    target_r: int = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None
    rank_pattern: dict | None = None

    def __post_init__(self):
        AdapterConfig.__post_init__(self)  # LoRA's own checks are about a rank_pattern of numbers
        for what in ("init_r", "target_r", "deltaT"):
            check_rank(what, getattr(self, what))
        if not isinstance(self.total_step, int) or self.total_step <= 0:
            raise RecipeError(f"total_step={self.total_step!r}: AdaLoRA's schedule needs the number of training steps")
        if self.tinit >= self.total_step - self.tfinal:
            raise RecipeError(
                f"tinit={self.tinit}, tfinal={self.tfinal}, total_step={self.total_step} leave no step to reduce the "
                f"rank in: nearest valid tinit: {self.total_step - self.tfinal - 1}"
            )
        if self.orth_reg_weight < 0:
            raise RecipeError(f"orth_reg_weight={self.orth_reg_weight!r}: expected 0 or more")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise RecipeError(f"lora_dropout: expected 0 <= p < 1, got {self.lora_dropout!r}")
        if not isinstance(self.init_lora_weights, bool):
            raise RecipeError(f"init_lora_weights={self.init_lora_weights!r}: AdaLoRA has True and False")

    def with_rank(self, rank):
        return replace(self, init_r=rank, rank_pattern=None)


class AdaLoRA(Matrices):
    name = "ADALORA"
    Config = AdaLoraConfig

    def check(self, target, config):
        kept = self.kept(target, config)
        if kept is not None and (not isinstance(kept, list) or not all(isinstance(k, bool) for k in kept)):
            return f"rank_pattern: expected a list of booleans, got {kept!r}"
        return super().check(target, config)

    def kept(self, target, config) -> list[bool] | None:
        return (config.rank_pattern or {}).get(f"{target.file_path or target.path}.lora_E")

    def rank(self, target, config) -> int:
        kept = self.kept(target, config)
        return config.init_r if kept is None else sum(map(bool, kept))

    def dropout(self, config):
        return config.lora_dropout

    def tensors(self, target, config):
        r = self.rank(target, config)
        vectors, values = (partial(scaled_normal, 0.02), zeros) if config.init_lora_weights else (normal, normal)
        scale = (config.lora_alpha if config.lora_alpha > 0 else r) / (config.init_r + 1e-5)
        return {
            "lora_A": Tensor((r, row_size(target)), vectors, "lora_A", pad=((0, 1),)),
            "lora_E": Tensor((r, 1), values, "lora_E", pad=((0, 1),)),
            "lora_B": Tensor((target.out_features, r), vectors, "lora_B", pad=((1, 1),)),
            "scaling": Tensor((), partial(constant, scale), trainable=False),
        }

    def neutral(self, target, config):
        return {"lora_E": 0.0}

    def matrices(self, theta, target, config):
        A, B = theta["lora_A"] * (theta["lora_E"] * theta["scaling"]), theta["lora_B"]
        return (A, B) if len(A) else (F.pad(A, (0, 0, 0, 1)), F.pad(B, (0, 1)))  # torch has no product over rank 0
