"""PEFT's tables of classes. Whoever asks for constants need not wait for transformers, as these do."""

from __future__ import annotations

from ...methods import INTERNAL, METHODS
from ...peft_types import PeftType
from ..model.model import CLASSES as MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from ..model.tuner import Tuner
from ..model.tuners import tuner_class

__all__ = ["MODEL_TYPE_TO_PEFT_MODEL_MAPPING"]


def __getattr__(name: str) -> dict[PeftType, type[Tuner]]:
    if name in ("PEFT_TYPE_TO_TUNER_MAPPING", "PEFT_TYPE_TO_MIXED_MODEL_MAPPING"):  # of users' methods too
        return {PeftType(name): tuner_class(name) for name in METHODS if name not in INTERNAL}
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
