"""LayerNorm tuning (Zhao et al. 2023, arXiv 2312.11420): the norms are trained as they are, in a copy of their own.

    W' = weight, b' = bias, ...        whatever the module owns; buffers are copied, not trained

Any module may be chosen, as in PEFT. Starts as the model's own numbers, in the model's dtype. Only one such adapter can be
active. MultiheadAttention is refused: PEFT files a part of it under the adapter's name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..config import LORA_ONLY, AdapterConfig
from ..target import ModuleRecord, Target
from .base import Substitute, Tensor
from .inits import copy_base

TRAINED = {"parameter": True, "buffer": False}  # kind of what a module owns -> whether its copy is trained


@dataclass
class LNTuningConfig(AdapterConfig):
    peft_type = "LN_TUNING"
    absent = LORA_ONLY | {"bias", "layers_pattern", "layers_to_transform"}


class LNTuning(Substitute):
    name = "LN_TUNING"
    Config = LNTuningConfig

    def places(self, chosen: Target, record: ModuleRecord, config) -> Sequence[Target]:
        if chosen.by_parameter or record.is_a("MultiheadAttention") or chosen.wrapper:
            return (chosen,)
        whole = replace(chosen, transposed=False, groups=1, bias="", has_bias=False)
        return [
            replace(whole, parameter=name, kind=kind, shape=shape)
            for kind, owned in zip(TRAINED, (record.parameters, record.buffers), strict=True)
            for name, shape in owned.items()
        ]

    def check(self, target, config):
        if target.kind in TRAINED:
            return None
        return "LN_TUNING copies modules that own their numbers: no MultiheadAttention, no target_parameters"

    def own_rows(self, target, config):
        return range(target.shape[0]) if target.shape else (0,)

    def tensors(self, target, config):
        key = f"ln_tuning_layers.{target.parameter}"
        return {"own": Tensor(target.shape, copy_base, key, trainable=TRAINED[target.kind], like_base=True)}

    def weight(self, W, b, theta, target, config):
        return theta["own"].to(W.dtype), b
