"""The methods, one file each. The table below is the whole registry: PEFT's `peft_type` -> module, class and config.

Methods of users are put into the same table, as classes, by `@peft_fx.method("NAME")` (own.py).
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

from ..config import AdapterConfig
from ..errors import UnknownMethodError
from ..missing import METHODS as MISSING
from ..missing import not_yet
from ..suggestions import did_you_mean

if TYPE_CHECKING:  # it imports torch, which the names of the methods can do without
    from .base import Method

METHODS: dict[str, tuple[str, ...] | type[Method]] = {
    "ADALORA": ("adalora", "AdaLoRA", "AdaLoraConfig"),
    "ADAMSS": ("adamss", "AdaMSS", "AdamssConfig"),
    "BEFT": ("beft", "BEFT", "BeftConfig"),
    "BOFT": ("boft", "BOFT", "BOFTConfig"),
    "C3A": ("c3a", "C3A", "C3AConfig"),
    "DEFT": ("deft", "DEFT", "DeftConfig"),
    "DELORA": ("delora", "DeLoRA", "DeloraConfig"),
    "DORA": ("dora", "DoRA"),
    "FOURIERFT": ("fourierft", "FourierFT", "FourierFTConfig"),
    "FROD": ("frod", "FRoD", "FrodConfig"),
    "GLORA": ("glora", "GLoRA", "GloraConfig"),
    "GRALORA": ("gralora", "GraLoRA", "GraloraConfig"),
    "HIRA": ("hira", "HiRA", "HiraConfig"),
    "HRA": ("hra", "HRA", "HRAConfig"),
    "IA3": ("ia3", "IA3", "IA3Config"),
    "IA3_INPUT": ("ia3", "IA3Input"),
    "LILY": ("lily", "Lily", "LilyConfig"),
    "LN_TUNING": ("ln_tuning", "LNTuning", "LNTuningConfig"),
    "LOHA": ("loha", "LoHa", "LoHaConfig"),
    "LOKR": ("lokr", "LoKr", "LoKrConfig"),
    "LORA": ("lora", "LoRA", "LoraConfig"),
    "MISS": ("miss", "MiSS", "MissConfig"),
    "MISS_BAT": ("miss_bat", "MissBat"),
    "OFT": ("oft", "OFT", "OFTConfig"),
    "OFT_OUTPUT": ("oft", "OFTOutput"),
    "OSF": ("osf", "OSF", "OSFConfig"),
    "PEANUT": ("peanut", "PEANuT", "PeanutConfig"),
    "PSOFT": ("psoft", "PSOFT", "PsoftConfig"),
    "PVERA": ("pvera", "PVeRA", "PveraConfig"),
    "RANDLORA": ("randlora", "RandLora", "RandLoraConfig"),
    "ROAD": ("road", "RoAd", "RoadConfig"),
    "SAVED": ("substitute", "Saved"),
    "SHIRA": ("shira", "SHiRA", "ShiraConfig"),
    "SUPERTUNING": ("supertuning", "SuperTuning", "SupertuningConfig"),
    "TINYLORA": ("tinylora", "TinyLoRA", "TinyLoraConfig"),
    "TOKENS": ("substitute", "Tokens"),
    "TRAINABLE_TOKENS": ("trainable_tokens", "TrainableTokens", "TrainableTokensConfig"),
    "UNILORA": ("unilora", "UniLoRA", "UniLoraConfig"),
    "VBLORA": ("vblora", "VBLoRA", "VBLoRAConfig"),
    "VERA": ("vera", "VeRA", "VeraConfig"),
    "WAVEFT": ("waveft", "WaveFT", "WaveFTConfig"),
}
# Chosen by a method's `at`, or placed by the fields that all configs share; not a `peft_type` that a config can have.
INTERNAL = frozenset({"DORA", "IA3_INPUT", "MISS_BAT", "OFT_OUTPUT", "SAVED", "TOKENS"})


def get_method(peft_type: str | None) -> Method:
    """The method for a `peft_type`. Raises RecipeError with the known types."""
    key = str(getattr(peft_type, "value", peft_type)).upper()
    if key not in METHODS:
        raise unknown(peft_type)
    entry = METHODS[key]
    if isinstance(entry, type):
        return entry()
    return loaded(*entry[:2])


@cache
def loaded(module: str, name: str) -> Method:
    """A method of this package, which is imported when it is first asked for."""
    return getattr(import_module(f"{__name__}.{module}"), name)()


def get_config(peft_type: str) -> type[AdapterConfig]:
    """The config class for a `peft_type`. Raises RecipeError with the known types."""
    if str(getattr(peft_type, "value", peft_type)).upper() in INTERNAL:
        raise unknown(peft_type)
    return get_method(peft_type).Config


def unknown(peft_type) -> UnknownMethodError:
    names = METHODS.keys() - INTERNAL
    key, public = str(getattr(peft_type, "value", peft_type)), ", ".join(sorted(names))
    if key.upper() in MISSING:
        return UnknownMethodError(f"peft_type {not_yet(repr(key))}; it has: {public}")
    return UnknownMethodError(
        f"peft_type {key!r} is unknown; if it is a method of your own, import the module that registers it with "
        f"@peft_fx.method first; this version has: {public}{did_you_mean(key, names)}"
    )
