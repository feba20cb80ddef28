"""LoRA: Low-Rank Adaptation (Hu et al. 2021, arXiv 2106.09685); rank-stabilised scale (Kalajdzievski 2023, arXiv 2312.03732).

    W' = W + s B A        s = alpha / r, or alpha / sqrt(r) with use_rslora
    y  = W x + s B (A dropout(x))           A: (r, in, *kernel), B: (out, r / groups)

Grouped convolutions follow PEFT's files: A sees all input channels, only B is grouped; the update then crosses groups and
the merged weight is the one of an ungrouped convolution. Experts: one (A, B) pair each, filed as PEFT interleaves them.
Deviations from PEFT, which is wrong there: conv dilation and padding mode apply to the branch; merging with groups works;
MultiheadAttention's output projection gets its update once. As in PEFT, token ids cannot be dropped out: on embeddings
lora_dropout has no effect.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

from ..config import AdapterConfig, by_pattern, check_rank, pattern_field
from ..errors import RecipeError
from . import get_method
from .base import Additive, Factors, Tensor
from .inits import constant, kaiming, normal, scaled_normal, zeros

INITS = (True, False, "gaussian")
NEEDS_DATA = f"this initialisation is not part of this version; use one of {INITS}"
VARIANT = "this LoRA variant is not part of this version"


@dataclass(frozen=True)
class LoraConfig(AdapterConfig):
    peft_type = "LORA"
    refused = dict.fromkeys(
        ("velora_config", "alora_invocation_tokens", "use_qalora", "monteclora_config", "use_bdlora",
         "arrow_config", "kasa_config", "megatron_config"), VARIANT
    ) | dict.fromkeys(("loftq_config", "eva_config", "corda_config", "lora_ga_config"), NEEDS_DATA)  # fmt: skip

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    lora_bias: bool = False
    init_lora_weights: bool | str = True
    fan_in_fan_out: bool = False
    rank_pattern: dict = pattern_field()
    alpha_pattern: dict = pattern_field()
    use_dora: bool = False
    use_qalora: bool = False
    qalora_group_size: int = 16
    megatron_config: dict | None = None
    megatron_core: str | None = "megatron.core"
    loftq_config: dict = pattern_field()
    eva_config: dict | None = None
    corda_config: dict | None = None
    lora_ga_config: dict | None = None
    velora_config: dict | None = None
    alora_invocation_tokens: list[int] | None = None
    monteclora_config: dict | None = None
    use_bdlora: dict | None = None
    arrow_config: dict | None = None
    kasa_config: dict | None = None

    def __post_init__(self):
        super().__post_init__()
        for what, rank in {"r": self.r, **{f"rank_pattern[{k!r}]": v for k, v in self.rank_pattern.items()}}.items():
            check_rank(what, rank)
        if not 0.0 <= self.lora_dropout < 1.0:
            raise RecipeError(f"lora_dropout: expected 0 <= p < 1, got {self.lora_dropout!r}")
        if self.init_lora_weights not in INITS:
            raise RecipeError(f"init_lora_weights={self.init_lora_weights!r} is refused: {NEEDS_DATA}")

    def with_rank(self, rank):
        return replace(self, r=rank, rank_pattern={})


class LoRA(Additive):
    name = "LORA"
    Config = LoraConfig
    refuses = {"norm": "LoRA has no form on a 1-d weight; name it in modules_to_save to train it whole"}

    # operator kind -> names of the two factors, suffix of their keys in the file
    NAMES = {"embedding": ("lora_embedding_A", "lora_embedding_B", "")}
    # operator kind -> which factor starts at zero and how the other one starts, where it differs from (B, kaiming on A)
    ZERO_FIRST = frozenset({"embedding"})

    def names(self, target):
        return self.NAMES.get(target.kind, ("lora_A", "lora_B", ".weight"))

    def at(self, target, config):
        return get_method("DORA") if config.use_dora else self

    def check(self, target, config):
        r = self.rank(target, config)
        if r % target.groups:
            nearest = max(r // target.groups, 1) * target.groups
            return f"r={r} is not divisible by groups={target.groups}; nearest valid: {nearest}"
        if config.lora_bias and target.kind not in ("linear", "conv1d", "conv2d", "conv3d"):
            return f"lora_bias has no meaning on kind {target.kind}"
        if target.kind == "expert" and config.lora_dropout:
            return "lora_dropout is not available on target_parameters; set it to 0"
        return None

    def rank(self, target, config) -> int:
        return by_pattern(config.rank_pattern, target.pattern_path, config.r)

    def scaling(self, target, config) -> float:
        alpha = by_pattern(config.alpha_pattern, target.pattern_path, config.lora_alpha)
        r = self.rank(target, config)
        return alpha / math.sqrt(r) if config.use_rslora else alpha / r

    def dense_groups(self, target):
        return target.groups > 1

    def dropout(self, config):
        return config.lora_dropout

    def tensors(self, target, config):
        r, E = self.rank(target, config), target.experts or 1
        name_A, name_B, suffix = self.names(target)
        init_A, init_B = INIT[config.init_lora_weights](r)
        if target.kind in self.ZERO_FIRST and config.init_lora_weights is not False:
            init_A, init_B = zeros, normal
        pointwise = (1,) * len(target.kernel)
        spec = {
            name_A: Tensor(
                (E * r, target.in_features, *target.kernel), init_A, name_A + suffix, pad=((0, E * target.groups),)
            ),
            name_B: Tensor(
                (target.out_features, E * r // target.groups, *pointwise), init_B, name_B + suffix, pad=((1, 1),)
            ),
            "scaling": Tensor((), partial(constant, self.scaling(target, config)), trainable=False),
        }
        if config.lora_bias:
            spec["lora_B_bias"] = Tensor((target.out_features,), zeros, "lora_B.bias")
        return spec

    def neutral(self, target, config):
        return {name: 0.0 for name in (self.names(target)[1], *(["lora_B_bias"] if config.lora_bias else []))}

    def tied(self, target, source, config):
        if self.rank(target, config) != self.rank(source, config):
            return None
        here, there = self.names(target)[:2], self.names(source)[:2]
        swapped = target.transposed != source.transposed  # W = Eᵀ, so that B A there is Aᵀ Bᵀ here
        return {h: (t, swapped) for h, t in zip(here, reversed(there) if swapped else there, strict=True)}

    def factors(self, theta, target, config):
        name_A, name_B, _ = self.names(target)
        A, B = theta[name_A], theta[name_B]
        if target.kernel:
            B = B.flatten(1)
        if E := target.experts:  # A: expert-major rows; B: column j belongs to expert j mod E
            A, B = A.unflatten(0, (E, -1)), B.unflatten(1, (-1, E)).permute(2, 0, 1)
        return Factors(A, B, theta["scaling"], theta.get("lora_B_bias"))


# init_lora_weights -> rank -> initialisers of (A, B)
INIT = {
    True: lambda r: (kaiming, zeros),
    False: lambda r: (kaiming, kaiming),
    "gaussian": lambda r: (partial(scaled_normal, 1 / r), zeros),
}
