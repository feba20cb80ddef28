"""PEFT's constants. What config classes, default targets and files are called stands elsewhere, here is how PEFT calls it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ...config_files import CONFIG_FILE as CONFIG_NAME
from ...errors import NothingToAdaptError as NoMatchingPeftModuleError  # noqa: F401
from ...errors import PeftFxError
from ...files.read import PICKLE as WEIGHTS_NAME
from ...files.read import TENSORS as SAFETENSORS_WEIGHTS_NAME
from ...methods import INTERNAL, METHODS, get_config
from ...peft_types import PeftType
from ...planning.defaults import ALL_LINEAR, DEFAULT_NAMES, DEFAULT_TARGETS, NO_TARGETS, TASK_HEADS

__all__ = ["CONFIG_NAME", "SAFETENSORS_WEIGHTS_NAME", "WEIGHTS_NAME"]

INCLUDE_LINEAR_LAYERS_SHORTHAND = ALL_LINEAR
DUMMY_TARGET_MODULES = NO_TARGETS
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
EMBEDDING_LAYER_NAMES = ["embed_tokens", "lm_head"]
SEQ_CLS_HEAD_NAMES = sorted(TASK_HEADS["SEQ_CLS"], reverse=True)
ALLOWED_COMPUTE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
UPCAST_DTYPES = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")

PeftError = PeftFxError


class PeftWarning(UserWarning):
    """Warnings about adapters."""


# model type -> target_modules, under PEFT's name for each method
TARGET_TABLES: dict[str, Mapping[str | None, list[str] | str]] = {
    f"TRANSFORMERS_MODELS_TO_{str(method).replace('_', '')}_TARGET_MODULES_MAPPING": targets
    for method, targets in DEFAULT_TARGETS.items()
}
TARGET_TABLES |= {
    f"TRANSFORMERS_MODELS_TO_{method}_{field.upper()}_MAPPING": by_type
    for method, fields in DEFAULT_NAMES.items() for field, by_type in fields.items()
}  # fmt: skip
globals().update(TARGET_TABLES)


def __getattr__(name: str) -> Any:
    if name == "PEFT_TYPE_TO_CONFIG_MAPPING":  # imports every method
        return {PeftType(name): get_config(name) for name in METHODS if name not in INTERNAL}
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
