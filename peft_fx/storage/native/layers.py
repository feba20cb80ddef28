"""The layers: `quant_method` of a checkpoint's config -> (module, class), imported when they are first asked for."""

from __future__ import annotations

from functools import cache
from importlib import import_module

from .base import NativeLinear

LAYERS: dict[str, tuple[str, str]] = {
    "gptq": ("gptq", "GPTQLinear"),
    "awq": ("awq", "AWQLinear"),
    "hqq": ("hqq", "HQQLinear"),
    "aqlm": ("aqlm", "AQLMLinear"),
    "eetq": ("eetq", "EETQLinear"),
}


@cache
def layer(method: str) -> type[NativeLinear]:
    module, cls = LAYERS[method]
    return getattr(import_module(f".{module}", __package__), cls)
