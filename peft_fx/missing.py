"""What PEFT 0.21 has and this version does not, by the names under which it is asked for; one wording for all of it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

PEFT_VERSION = "0.21.2"  # the release of PEFT whose names, numbers and files these are
# peft_type -> PEFT's name for its classes, before "Config" and "Model"
METHODS = {
    "ADAPTION_PROMPT": "AdaptionPrompt",
    "CARTRIDGE": "Cartridge",
    "CPT": "CPT",
    "MULTITASK_PROMPT_TUNING": "MultitaskPromptTuning",
    "POLY": "Poly",
    "PREFIX_TUNING": "PrefixTuning",
    "PROMPT_TUNING": "PromptTuning",
    "P_TUNING": "PromptEncoder",
    "SHADOW": "Shadow",
    "XLORA": "XLora",
}
# field of LoraConfig that changes what is computed -> what it asks for
VARIANTS = {
    "alora_invocation_tokens": "Activated LoRA",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "megatron_config": "Megatron's parallelism",
    "monteclora_config": "MonteCLoRA",
    "runtime_config": "a runtime config (offloading to the CPU)",
    "use_bdlora": "BD-LoRA",
    "use_qalora": "QALoRA",
    "velora_config": "VeLoRA",
}
# field of LoraConfig that is about the start alone -> what it asks for
STARTS = {
    "corda_config": "CorDA's initialisation",
    "eva_config": "EVA's initialisation",
    "loftq_config": "LoftQ's initialisation",
    "lora_ga_config": "LoRA-GA's initialisation",
}


@dataclass(frozen=True)
class Init:
    """A value of init_lora_weights.

    moves_base: the start's update is taken out of the base weights, by what a file does not say.
    """

    name: str
    moves_base: bool = False


INITS = {
    "corda": Init("CorDA", moves_base=True),
    "eva": Init("EVA"),
    "loftq": Init("LoftQ", moves_base=True),
    "lora_ga": Init("LoRA-GA", moves_base=True),
    "mica": Init("MiCA"),
    "olora": Init("OLoRA"),
    "pissa": Init("PiSSA"),
}
# classes and functions that belong to these
NAMES = frozenset({
    "ArrowConfig", "BdLoraConfig", "CPTEmbedding", "CartridgeEncoder", "CordaConfig", "EvaConfig", "KasaConfig", "LoftQConfig",
    "LoraGAConfig", "LoraRuntimeConfig", "MontecloraConfig", "MultitaskPromptTuningInit", "PrefixEncoder", "PromptEmbedding",
    "PromptEncoder", "PromptEncoderReparameterizationType", "PromptLearningConfig", "PromptTuningInit",
    "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING", "VeloraConfig", "bloom_model_postprocess_past_key_value",
    "compose_cartridge_adapters", "convert_to_lora", "create_arrow_model", "get_eva_state_dict",
    "initialize_kv_prefix_from_past_key_values", "initialize_kv_prefix_from_text", "initialize_lora_eva_weights",
    "preprocess_loraga", "prompt_embeddings_from_past_key_values", "replace_lora_weights_loftq", "save_as_lora",
    *(f"{name}{kind}" for name in METHODS.values() for kind in ("Config", "Model")),
})  # fmt: skip


def not_yet(what: str) -> str:
    return f"{what} is not in this version yet"


def init_of(value: Any) -> Init | None:
    """What a value of init_lora_weights stands for, if it is one of those that are missing."""
    return INITS.get(re.sub("_niter_[0-9]+$", "", value.lower())) if isinstance(value, str) else None
