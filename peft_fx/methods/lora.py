"""LoRA: Low-Rank Adaptation (Hu et al. 2021, arXiv 2106.09685); rank-stabilised scale (Kalajdzievski 2023, arXiv 2312.03732).

    W' = W + s B A        s = alpha / r, or alpha / sqrt(r) with use_rslora
    y  = W x + s B (A dropout(x))           A: (r, in, *kernel), B: (out, r / groups)

Grouped convolutions as in PEFT's files: A sees all input channels, only B is grouped; the update crosses groups, and the
merged weight is an ungrouped convolution's. Experts: one (A, B) pair each, filed as PEFT interleaves them. Deviations from
PEFT, which is wrong there: conv dilation and padding mode apply to the branch; merging with groups works; the output
projection of MultiheadAttention gets its update once; lora_dropout works on experts. On token ids it has no effect, as in PEFT.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from ..checks import check_rank
from ..fields import pattern_field, probability, rank, start
from ..missing import init_of
from . import get_method
from .base import Additive, Factors, Tensor
from .inits import drawn_after, kaiming, normal, orthogonal, scaled_normal, uniform, zeros
from .lora_fields import LoraFields
from .scales import Ranked, fixed


@dataclass
class LoraConfig(LoraFields):
    peft_type = "LORA"
    ranked = "r"

    r: int = rank(8)
    lora_alpha: float = 8
    lora_dropout: float = probability(0.0)
    use_rslora: bool = False
    lora_bias: bool = False
    init_lora_weights: bool | str = start(True, False, "gaussian", "orthogonal", missing=init_of)
    fan_in_fan_out: bool = False
    rank_pattern: dict = pattern_field(check_rank)
    alpha_pattern: dict = pattern_field()
    use_dora: bool = False

    def missing_base(self):
        init = init_of(self.init_lora_weights)
        if init is None or not init.moves_base:
            return ""
        return (
            f"init_lora_weights={str(self.init_lora_weights)!r}: the adapter was trained beside base weights from which "
            f"{init.name} had taken its start, and no file says what that was: load it onto these weights, or have PEFT "
            "convert it where it was trained: save_pretrained(folder, path_initial_model_for_weight_conversion=...)"
        )


class LoRA(Ranked, Additive):
    name = "LORA"
    Config = LoraConfig
    stacks = True  # PEFT's files interleave the factors of experts
    refuses = {"norm": "LoRA has no form on a 1-d weight; name it in modules_to_save to train it whole"}
    drops = "lora_dropout"
    alpha = "lora_alpha"
    off = {"lora_B": 0.0, "lora_embedding_B": 0.0, "lora_B_bias": 0.0}

    def names(self, target) -> tuple[str, str, str]:
        """Names of A and B, and the suffix of their keys in the file."""
        return ("lora_embedding_A", "lora_embedding_B", "") if target.reads_ids else ("lora_A", "lora_B", ".weight")

    def at(self, target, config):
        return get_method("DORA") if config.use_dora else self

    def check(self, target, config):
        r, groups = self.rank(target, config), target.groups
        if r % groups:
            return f"r={r} is not divisible by groups={groups}; nearest valid: {max(r // groups, 1) * groups}"
        if config.init_lora_weights == "orthogonal" and not target.reads_ids:
            if r % 2:
                return f"init_lora_weights='orthogonal' needs an even rank, got r={r}; nearest valid: {r + 1}"
            if target.kernel or target.experts:
                return f"init_lora_weights='orthogonal' has no meaning on kind {target.kind}"
        if config.lora_bias and (target.reads_ids or target.experts):
            return f"lora_bias has no meaning on kind {target.kind}"
        return None

    def dense_groups(self, target):
        return target.groups > 1

    def tensors(self, target, config):
        r, E, m = self.rank(target, config), target.experts or 1, target.out_features
        name_A, name_B, suffix = self.names(target)
        A, B = (E * r, target.in_features, *target.kernel), (m, E * r // target.groups, *(1,) * len(target.kernel))
        made = normal if target.reads_ids else kaiming  # how PEFT's layers are before it initialises them
        gaussian = partial(scaled_normal, 1 / r)
        starts = {True: (kaiming, zeros), "gaussian": (gaussian, zeros), "orthogonal": orthogonal(r)}
        # of an adapter that began otherwise the numbers are in its file
        init_A, init_B = starts.get(config.init_lora_weights, (made, made))
        init_bias: Callable = partial(uniform, 1 / math.sqrt(B[1]))
        if config.init_lora_weights in starts:
            if target.reads_ids:
                init_A, init_B = zeros, normal
            init_A = partial(drawn_after, made, (A, B, (m,)) if config.lora_bias else (A, B), init_A)
            init_bias = zeros
        bias = {"lora_B_bias": Tensor((m,), init_bias, "lora_B.bias")} if config.lora_bias else {}
        return {
            name_A: Tensor(A, init_A, name_A + suffix, pad=((0, E * target.groups),)),
            name_B: Tensor(B, init_B, name_B + suffix, pad=((1, 1),)),
            "scaling": fixed(self.scaling(target, config)),
        } | bias

    def tied(self, target, source, config):
        if self.rank(target, config) != self.rank(source, config):
            return None
        here, there = self.names(target)[:2], self.names(source)[:2]
        swapped = target.transposed != source.transposed  # W = Eᵀ, so that B A there is Aᵀ Bᵀ here
        return {h: (t, swapped) for h, t in zip(here, reversed(there) if swapped else there, strict=True)}

    def factors(self, theta, target, config):
        A, B = (theta[name] for name in self.names(target)[:2])
        B = B.flatten(1) if target.kernel else B
        if E := target.experts:  # A: expert-major rows; B: column j belongs to expert j mod E
            A, B = A.unflatten(0, (E, -1)), B.unflatten(1, (-1, E)).permute(2, 0, 1)
        return Factors(A, B, theta["scaling"], theta.get("lora_B_bias"))
