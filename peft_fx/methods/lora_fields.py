"""Fields of PEFT's LoraConfig that this version cannot do: declared so that files round-trip, refused where they are set."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..config import AdapterConfig
from ..missing import STARTS, VARIANTS, not_yet


def of_the_start(default):
    """A field that is of no concern once the adapter has begun."""
    return field(**default, metadata={"start": (None, {})})


@dataclass
class LoraFields(AdapterConfig):
    refused = {name: not_yet(what) for name, what in (VARIANTS | STARTS).items()}

    use_qalora: bool = False
    qalora_group_size: int = 16
    megatron_config: dict | None = None
    megatron_core: str | None = "megatron.core"
    loftq_config: dict = of_the_start({"default_factory": dict})
    eva_config: dict | None = of_the_start({"default": None})
    corda_config: dict | None = of_the_start({"default": None})
    lora_ga_config: dict | None = of_the_start({"default": None})
    velora_config: dict | None = None
    alora_invocation_tokens: list[int] | None = None
    monteclora_config: dict | None = None
    use_bdlora: dict | None = None
    arrow_config: dict | None = None
    kasa_config: dict | None = None
