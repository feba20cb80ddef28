"""PEFT's classes of tuners, one per method: `LoraModel`, `IA3Model`, ... They differ in the `peft_type` that they take."""

from __future__ import annotations

from ...methods import INTERNAL, METHODS, get_config
from .tuner import Tuner

BaseTuner = Tuner
MADE: dict[str, type[Tuner]] = {}  # peft_type -> its class


def tuner_class(peft_type: str) -> type[Tuner]:
    """The class for a method of this package; `Tuner` for one of a user's."""
    if isinstance(METHODS[peft_type], type):
        return Tuner
    if peft_type not in MADE:
        name = get_config(peft_type).__name__.removesuffix("Config") + "Model"
        text = f"A model with {peft_type} adapters, without a `PeftModel` around it."
        MADE[peft_type] = type(name, (Tuner,), {"peft_type": peft_type, "__module__": __name__, "__doc__": text})
    return MADE[peft_type]


def __getattr__(name: str) -> type[Tuner]:
    for peft_type in METHODS.keys() - INTERNAL if name.endswith("Model") else ():
        if tuner_class(peft_type).__name__ == name:
            return tuner_class(peft_type)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
