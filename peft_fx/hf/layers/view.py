"""Attributes that a module gets from what adapts it, and gives up to whatever it calls so itself."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any, cast

from torch import nn

KEPT = ("_parameters", "_buffers", "_modules")


class View:
    """An attribute of adapted modules, computed at each look; a method if `bound`.

    A module's own attribute, tensor or part of the same name comes first: its forward reads it.
    """

    def __init__(self, function: Callable, bound: bool = False):
        self.function, self.bound = function, bound
        self.__doc__ = function.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def own(self, module: nn.Module) -> dict | None:
        """Where the module keeps something of its own under this name."""
        kept = module.__dict__
        return next((d for d in (kept, *(kept.get(k, {}) for k in KEPT)) if self.name in d), None)

    def __get__(self, module: nn.Module | None, owner: type | None = None) -> Any:
        if module is None:
            return self.function if self.bound else self
        if (own := self.own(module)) is not None:
            return own[self.name]
        return MethodType(self.function, module) if self.bound else self.function(module)

    def __set__(self, module: nn.Module, value: Any) -> None:
        if (own := self.own(module)) is None:
            raise AttributeError(
                f"{self.name} of an adapted {type(module).__name__} is a view of its adapters, got {value!r}: use set_adapter, "
                "enable_adapters, merge, unmerge, set_scale, or write into what it holds"
            )
        own[self.name] = value

    def __delete__(self, module: nn.Module) -> None:
        if (own := self.own(module)) is None:
            raise AttributeError(f"{self.name} of an adapted {type(module).__name__} is a view of its adapters")
        del own[self.name]


def viewed(cls: type) -> type:
    """The class with its public functions and properties as views."""
    for name, value in list(vars(cls).items()):
        if not name.startswith("_"):
            if isinstance(value, property):
                view = View(cast(Callable, value.fget))
            elif callable(value):
                view = View(value, bound=True)
            else:
                continue
            view.__set_name__(cls, name)
            setattr(cls, name, view)
    return cls
