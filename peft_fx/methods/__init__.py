"""The methods, one file each. The table below is the whole registry: PEFT's `peft_type` -> module and class.

Methods of users are put into the same table, as classes, by `@peft_fx.method("NAME")` (own.py).
"""

from __future__ import annotations

from functools import cache
from importlib import import_module

from ..config import AdapterConfig
from ..errors import UnknownMethodError
from ..missing import METHODS as MISSING
from ..missing import not_yet
from ..suggestions import did_you_mean
from .base import Method

METHODS = {
    "ADALORA": ("adalora", "AdaLoRA"),
    "ADAMSS": ("adamss", "AdaMSS"),
    "BEFT": ("beft", "BEFT"),
    "BOFT": ("boft", "BOFT"),
    "C3A": ("c3a", "C3A"),
    "DEFT": ("deft", "DEFT"),
    "DELORA": ("delora", "DeLoRA"),
    "DORA": ("dora", "DoRA"),
    "FOURIERFT": ("fourierft", "FourierFT"),
    "FROD": ("frod", "FRoD"),
    "GLORA": ("glora", "GLoRA"),
    "GRALORA": ("gralora", "GraLoRA"),
    "HIRA": ("hira", "HiRA"),
    "HRA": ("hra", "HRA"),
    "IA3": ("ia3", "IA3"),
    "IA3_INPUT": ("ia3", "IA3Input"),
    "LILY": ("lily", "Lily"),
    "LN_TUNING": ("ln_tuning", "LNTuning"),
    "LOHA": ("loha", "LoHa"),
    "LOKR": ("lokr", "LoKr"),
    "LORA": ("lora", "LoRA"),
    "MISS": ("miss", "MiSS"),
    "MISS_BAT": ("miss_bat", "MissBat"),
    "OFT": ("oft", "OFT"),
    "OFT_OUTPUT": ("oft", "OFTOutput"),
    "OSF": ("osf", "OSF"),
    "PEANUT": ("peanut", "PEANuT"),
    "PSOFT": ("psoft", "PSOFT"),
    "PVERA": ("pvera", "PVeRA"),
    "RANDLORA": ("randlora", "RandLora"),
    "ROAD": ("road", "RoAd"),
    "SAVED": ("substitute", "Saved"),
    "SHIRA": ("shira", "SHiRA"),
    "SUPERTUNING": ("supertuning", "SuperTuning"),
    "TINYLORA": ("tinylora", "TinyLoRA"),
    "TOKENS": ("substitute", "Tokens"),
    "TRAINABLE_TOKENS": ("trainable_tokens", "TrainableTokens"),
    "UNILORA": ("unilora", "UniLoRA"),
    "VBLORA": ("vblora", "VBLoRA"),
    "VERA": ("vera", "VeRA"),
    "WAVEFT": ("waveft", "WaveFT"),
}
# Chosen by a method's `at`, or placed by the fields that all configs share; not a `peft_type` that a config can have.
INTERNAL = frozenset({"DORA", "IA3_INPUT", "MISS_BAT", "OFT_OUTPUT", "SAVED", "TOKENS"})


def get_method(peft_type: str) -> Method:
    """The method for a `peft_type`. Raises RecipeError with the known types."""
    key = str(getattr(peft_type, "value", peft_type)).upper()
    if key not in METHODS:
        raise unknown(peft_type)
    entry = METHODS[key]
    if isinstance(entry, type):
        return entry()
    return loaded(*entry)


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
