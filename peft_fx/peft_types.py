"""PEFT's enumerations; their members are strings, equal to what config files hold."""

from __future__ import annotations

from enum import StrEnum
from typing import Any


class TaskType(StrEnum):
    """What a model is for, which decides the class of `PeftModel` and the heads that are trained with the adapter."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


# methods of users, which are no attributes of the class: name -> member
OWN: dict[str, PeftType] = {}


class PeftType(StrEnum):
    """PEFT's methods, those that this version lacks included."""

    ADALORA = "ADALORA"
    ADAMSS = "ADAMSS"
    ADAPTION_PROMPT = "ADAPTION_PROMPT"
    BEFT = "BEFT"
    BOFT = "BOFT"
    C3A = "C3A"
    CARTRIDGE = "CARTRIDGE"
    CPT = "CPT"
    DEFT = "DEFT"
    DELORA = "DELORA"
    FOURIERFT = "FOURIERFT"
    FROD = "FROD"
    GLORA = "GLORA"
    GRALORA = "GRALORA"
    HIRA = "HIRA"
    HRA = "HRA"
    IA3 = "IA3"
    LILY = "LILY"
    LN_TUNING = "LN_TUNING"
    LOHA = "LOHA"
    LOKR = "LOKR"
    LORA = "LORA"
    MISS = "MISS"
    MULTITASK_PROMPT_TUNING = "MULTITASK_PROMPT_TUNING"
    OFT = "OFT"
    OSF = "OSF"
    PEANUT = "PEANUT"
    POLY = "POLY"
    PREFIX_TUNING = "PREFIX_TUNING"
    PROMPT_TUNING = "PROMPT_TUNING"
    PSOFT = "PSOFT"
    PVERA = "PVERA"
    P_TUNING = "P_TUNING"
    RANDLORA = "RANDLORA"
    ROAD = "ROAD"
    SHADOW = "SHADOW"
    SHIRA = "SHIRA"
    SUPERTUNING = "SUPERTUNING"
    TINYLORA = "TINYLORA"
    TRAINABLE_TOKENS = "TRAINABLE_TOKENS"
    UNILORA = "UNILORA"
    VBLORA = "VBLORA"
    VERA = "VERA"
    WAVEFT = "WAVEFT"
    XLORA = "XLORA"

    @classmethod
    def _missing_(cls, value: Any) -> PeftType | None:
        return OWN.get(value) if isinstance(value, str) else None


def known_type(name: str) -> PeftType:
    """The member for a method's name; one more for a method of a user's."""
    if name not in PeftType.__members__ and name not in OWN:
        member = str.__new__(PeftType, name)
        member._name_ = member._value_ = name
        OWN[name] = member
    return PeftType(name)
