"""PEFT's enumerations; their members are strings, equal to what config files hold."""

from __future__ import annotations

from enum import StrEnum

from ..methods import INTERNAL, METHODS

PeftType = StrEnum("PeftType", {name: name for name in METHODS if name not in INTERNAL})


class TaskType(StrEnum):
    """What the model is for, which decides the class of `PeftModel` and the heads that are trained with the adapter."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"
