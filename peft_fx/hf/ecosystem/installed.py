"""PEFT, installed: its names lead to us, for every method that we have; others, and models that PEFT has adapted, stay its own.

Its classes stay what others compare with. What is made of them, and what they pass for, is ours: a `PeftModel(...)` or
`PeftModel.from_pretrained(...)` is one of peft_fx's, and every config of ours is an instance of PEFT's class for the method.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from types import FunctionType, ModuleType
from typing import Any
from weakref import WeakSet

from torch import nn

from ...atomic import StrPath
from ...config import AdapterConfig
from ...errors import NoAdaptersError
from ...methods import INTERNAL, METHODS, get_config
from ...store.unwrap import unwrapped
from ..compat.submodules import SUBMODULES
from ..model import model as models
from ..model.tuner import tuner_of
from ..model.tuners import tuner_class
from .changes import Changes, plain

OURS = __name__.partition(".")[0]


def lead_all(peft: ModuleType, changes: Changes) -> None:
    """PEFT's functions, models, tables and configs."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    left: WeakSet[nn.Module] = WeakSet()  # models that are PEFT's to adapt

    def ours(*args: Any, **kwargs: Any) -> bool:
        """Whether a call with these arguments is for us: adapted models decide, then configs."""
        given = (*args, *kwargs.values())
        for model in map(unwrapped, models_in(given)):
            if is_ours(model):
                return True
            if model in left or any(BaseTunerLayer in type(part).__mro__ for part in model.modules()):
                return False
        configs = (c for value in given for c in (value.values() if isinstance(value, dict) else (value,)))
        return any(isinstance(c, peft.PeftConfig) and known(c) for c in configs)

    changes.functions({theirs: led(theirs, function, ours) for theirs, function in functions(peft)})
    for name in ("PeftModel", "PeftMixedModel"):
        lead_model(getattr(peft, name), ours, left, changes)
    for table in (peft.PEFT_TYPE_TO_TUNER_MAPPING, peft.PEFT_TYPE_TO_MIXED_MODEL_MAPPING):
        for peft_type in here() & table.keys():
            key = peft.PeftType(peft_type)
            changes.item(table, key, led_tuner(table[key], tuner_class(peft_type), ours))
    configs = [(get_config(peft_type), peft.PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type)) for peft_type in here()]
    changes.bases(AdapterConfig, (*AdapterConfig.__bases__, peft.PeftConfig))
    for config, theirs in configs:
        if theirs is not None:
            changes.bases(config, (*config.__bases__, theirs))


def models_in(values: Iterable) -> Iterator[nn.Module]:
    return (value for value in values if isinstance(value, nn.Module))


def is_ours(model: nn.Module) -> bool:
    try:
        return tuner_of(model) is not None
    except NoAdaptersError:
        return False


def here() -> set[str]:
    """Methods that there are, a user's among them."""
    return METHODS.keys() - INTERNAL


def known(config: Any) -> bool:
    """Whether a config of PEFT's is for a method that we have."""
    return str(getattr(config.peft_type, "value", config.peft_type)) in here()


def functions(peft: ModuleType) -> Iterator[tuple[FunctionType, FunctionType]]:
    """PEFT's public functions that we have under the same names, with ours."""
    for submodule in ("", *SUBMODULES):
        theirs = import_module(f"{peft.__name__}.{submodule}".rstrip("."))
        own = import_module(f"{OURS}.{submodule}".rstrip("."))
        for name, value in list(vars(theirs).items()):
            theirs_to_lead = isinstance(value, FunctionType) and value.__module__.partition(".")[0] == peft.__name__
            if theirs_to_lead and isinstance(function := getattr(own, name, None), FunctionType):
                yield value, function


def led(theirs: Callable, function: Callable, ours: Callable[..., bool]) -> Callable:
    @functools.wraps(theirs)
    def either(*args: Any, **kwargs: Any) -> Any:
        return (function if ours(*args, **kwargs) else theirs)(*args, **kwargs)

    return either


def led_tuner(theirs: type, own: type, ours: Callable[..., bool]) -> type:
    """What makes a tuner of ours, or one of PEFT's class, and has that one's attributes: PEFT asks it about models of its own."""

    def new(cls: type, *args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs) if ours(*args, **kwargs) else plain(cls)

    return type(theirs)(theirs.__name__, (theirs,), {"__new__": new, "__module__": theirs.__module__})


def lead_model(cls: type, ours: Callable[..., bool], left: WeakSet[nn.Module], changes: Changes) -> None:
    """A class of PEFT's, and those derived from it in PEFT, whose names ours have too.

    left: gets the models of classes that somebody else derived, whose methods are written for what PEFT has.
    """
    theirs, package = cls.__dict__["from_pretrained"].__func__, cls.__module__.partition(".")[0]

    def counterpart(asked: type) -> type[models.PeftModel] | None:
        return getattr(models, asked.__name__, None) if asked.__module__.partition(".")[0] == package else None

    def new(asked: type, *args: Any, **kwargs: Any) -> Any:
        own = counterpart(asked)
        if own is None:
            left.update(models_in((*args, *kwargs.values())))
        return own(*args, **kwargs) if own and ours(*args, **kwargs) else plain(asked)

    def from_pretrained(asked: type, model: nn.Module, model_id: StrPath, *args: Any, **kwargs: Any) -> Any:
        call = inspect.signature(theirs).bind(asked, model, model_id, *args, **kwargs)
        config = call.arguments.get("config") or sys.modules[package].PeftConfig.from_pretrained(model_id, **kwargs)
        own = counterpart(asked)
        if own and ours(model, config):
            return own.from_pretrained(model, model_id, *args, **kwargs)
        return theirs(asked, model, model_id, *args, **kwargs)

    changes.constructor(cls, new)
    changes.attribute(cls, "from_pretrained", classmethod(functools.wraps(theirs)(from_pretrained)))
