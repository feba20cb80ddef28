"""Fields of PEFT's LoraConfig that this version cannot do: declared so that files round-trip, refused where they are set."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import AdapterConfig, pattern_field

NEEDS_DATA = "initialisations that look at data are not part of this version"
VARIANT = "this LoRA variant is not part of this version"


@dataclass
class LoraFields(AdapterConfig):
    refused = dict.fromkeys(
        ("velora_config", "alora_invocation_tokens", "use_qalora", "monteclora_config", "use_bdlora",
         "arrow_config", "kasa_config", "megatron_config"), VARIANT
    ) | dict.fromkeys(("loftq_config", "eva_config", "corda_config", "lora_ga_config"), NEEDS_DATA)  # fmt: skip

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
