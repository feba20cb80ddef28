"""AdaLoRA: Adaptive Budget Allocation (Zhang et al. 2023, arXiv 2303.10512).

    W' = W + s / (init_r + 1e-5) B diag(E) A        s = lora_alpha, or the rank where lora_alpha is 0
    A: (r, n / groups * kernel...), E: (r, 1), B: (out, r)

Starts as the identity (E = 0) with init_r components; training (peft_fx.training.adalora) zeroes unimportant ones, and
rank_pattern ("<module>.lora_E" -> a boolean per component) says which a file holds. The scale does not follow the rank; r has
no meaning. Deviations from PEFT, which is wrong there: a convolution's dilation and padding mode apply to the update, grouped
ones work (there: an error in the forward), and LoRA's fields that AdaLoRA ignores in silence are refused.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from torch.nn import functional as F

from ..errors import RecipeError
from ..fields import nonnegative, rank, start
from ..missing import Init, init_of
from .base import Tensor
from .inits import drawn_after, normal, scaled_normal, zeros
from .lora import LoraConfig
from .matrices import Matrices, row_size
from .scales import fixed


def start_of_lora(value) -> Init | None:
    """Ways to begin that PEFT's AdaLoRA takes for True."""
    known = init_of(value) or value in ("gaussian", "orthogonal")
    return Init(f"AdaLoRA that begins with {value!r}") if known else None


@dataclass
class AdaLoraConfig(LoraConfig):
    peft_type = "ADALORA"
    ignored = (*LoraConfig.refused, "use_rslora", "lora_bias", "alpha_pattern", "use_dora")
    refused = dict.fromkeys(ignored, "AdaLoRA makes no use of it")
    patterns = ()
    ranked = "init_r"

    target_r: int = rank(8)
    init_r: int = rank(12)
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = rank(1)
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = nonnegative(0.5)
    total_step: int | None = None
    init_lora_weights: bool | str = start(True, False, missing=start_of_lora)
    rank_pattern: dict | None = None  # type: ignore[assignment]

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.total_step, int) or self.total_step <= 0:
            raise RecipeError(f"total_step={self.total_step!r}: AdaLoRA's schedule needs the number of training steps")
        if self.tinit >= (end := self.total_step - self.tfinal):
            given = f"tinit={self.tinit}, tfinal={self.tfinal}, total_step={self.total_step}"
            raise RecipeError(f"{given} leave no step to reduce the rank in: nearest valid tinit: {end - 1}")


class AdaLoRA(Matrices):
    name = "ADALORA"
    Config = AdaLoraConfig
    drops = "lora_dropout"
    off = {"lora_E": 0.0}

    def advice(self, target, config):
        return None if config.r == 8 else f"r={config.r} has no meaning for AdaLoRA: the rank starts as init_r"

    def kept(self, target, config) -> list[bool]:
        """Which of the first components there are."""
        pattern = config.rank_pattern or {}
        return pattern.get(f"{target.file_path or target.path}.lora_E", [True] * config.init_r)

    def check(self, target, config):
        kept = self.kept(target, config)
        if not isinstance(kept, list) or not all(isinstance(k, bool) for k in kept):
            return f"rank_pattern: expected a list of booleans, got {kept!r}"
        return super().check(target, config)

    def tensors(self, target, config):
        r = sum(self.kept(target, config))
        A, E, B, one = (r, row_size(target)), (r, 1), (target.out_features, r), (1,)
        scale = (config.lora_alpha if config.lora_alpha > 0 else r) / (config.init_r + 1e-5)
        start_A, values, vectors, scaling = normal, normal, normal, fixed(scale)
        if config.init_lora_weights:
            values, vectors = zeros, partial(scaled_normal, 0.02)
            start_A = partial(drawn_after, normal, (A, E, B, one), vectors)
        else:  # PEFT draws the rank's tensor too
            scaling = replace(scaling, init=partial(drawn_after, normal, (one,), scaling.init))
        return {
            "lora_A": Tensor(A, start_A, "lora_A", pad=((0, 1),)),
            "lora_E": Tensor(E, values, "lora_E", pad=((0, 1),)),
            "lora_B": Tensor(B, vectors, "lora_B", pad=((1, 1),)),
            "scaling": scaling,
        }

    def matrices(self, theta, target, config):
        A, B = theta["lora_A"] * (theta["lora_E"] * theta["scaling"]), theta["lora_B"]
        return (A, B) if len(A) else (F.pad(A, (0, 0, 0, 1)), F.pad(B, (0, 1)))  # torch has no product over rank 0
