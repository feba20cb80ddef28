"""`@peft_fx.method("NAME")`: a class of your own becomes a method, with NAME as its `peft_type`."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable

from ..config import AdapterConfig
from ..errors import RecipeError
from . import METHODS
from .base import Method


def method(name: str) -> Callable[[type[Method]], type[Method]]:
    """Registers a subclass of one of the shapes in `peft_fx.methods.base` under `name`, for this process.

    The fields of its config are the annotated attributes of the class (name: type = default), besides those that all
    methods share; a nested `class Config(AdapterConfig)` can do the same and add checks. Registering a name again replaces
    the class for graphs that are derived afterwards, as a notebook needs. Raises RecipeError for names that
    this package has, and for classes that are no method.

        @peft_fx.method("SCALE")
        class Scale(OutputMap):
            start: float = 1.0
            ...
        peft_fx.apply(graph, {"peft_type": "SCALE", "start": 0.5, "target_modules": "all-linear"})
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise RecipeError(f"a method's name is an identifier, got {name!r}")
    key = name.upper()
    if isinstance(METHODS.get(key), tuple):
        raise RecipeError(f"{key} is a method of this package; give yours another name")

    def register(cls: type[Method]) -> type[Method]:
        if not (isinstance(cls, type) and issubclass(cls, Method)):
            raise RecipeError(f"{key}: {cls!r} derives from none of the shapes in peft_fx.methods.base")
        cls.name, cls.Config = key, config_of(cls, key)
        METHODS[key] = cls
        return cls

    return register


def config_of(cls: type[Method], peft_type: str) -> type[AdapterConfig]:
    """The nested config, or one made of the class's annotated attributes, as a dataclass."""
    nested = vars(cls).get("Config")
    source = cls if nested is None else nested
    base = getattr(cls, "Config", AdapterConfig)
    if nested is not None:
        base = nested if issubclass(nested, AdapterConfig) else AdapterConfig
    own = {n: a for n, a in inspect.get_annotations(source).items() if n not in ("name", "Config")}
    body = {"peft_type": peft_type, "__module__": cls.__module__, "__qualname__": f"{cls.__qualname__}.Config"}
    if "__dataclass_params__" not in vars(source):
        if without := [n for n in own if n not in vars(source)]:
            raise RecipeError(f"{peft_type}: config field {without[0]!r} has no default")
        body |= {"__annotations__": own} | {n: vars(source)[n] for n in own}
    return dataclasses.dataclass(type("Config", (base,), body))
