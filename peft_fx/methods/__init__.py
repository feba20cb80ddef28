"""The methods, one file each. The table below is the whole registry: PEFT's `peft_type` -> module and class."""

from __future__ import annotations

from importlib import import_module

from ..config import AdapterConfig
from ..errors import RecipeError
from .base import Method

METHODS = {
    "IA3": ("ia3", "IA3"),
    "IA3_INPUT": ("ia3", "IA3Input"),
    "DORA": ("dora", "DoRA"),
    "LORA": ("lora", "LoRA"),
    "SAVED": ("substitute", "Saved"),
    "TOKENS": ("substitute", "Tokens"),
    "VERA": ("vera", "VeRA"),
}
# Chosen by a method's `at`, or placed by the fields that all configs share; not a `peft_type` that a config can have.
INTERNAL = frozenset({"DORA", "IA3_INPUT", "SAVED", "TOKENS"})


def get_method(peft_type: str) -> Method:
    """The method for a `peft_type`. Raises RecipeError with the known types."""
    key = str(getattr(peft_type, "value", peft_type)).upper()
    if key not in METHODS:
        raise unknown(peft_type)
    module, name = METHODS[key]
    return getattr(import_module(f"{__name__}.{module}"), name)()


def get_config(peft_type: str) -> type[AdapterConfig]:
    """The config class for a `peft_type`. Raises RecipeError with the known types."""
    if str(getattr(peft_type, "value", peft_type)).upper() in INTERNAL:
        raise unknown(peft_type)
    return get_method(peft_type).Config


def unknown(peft_type) -> RecipeError:
    public = ", ".join(sorted(METHODS.keys() - INTERNAL))
    return RecipeError(f"peft_type {peft_type!r} is unknown; this version has: {public}")
