"""What a PeftModel is taken for: one of its model's class and of PEFT's, with its model's signature."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from types import MethodType
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

if TYPE_CHECKING:
    from .model import PeftModel

Made = TypeVar("Made")


def signed(model: nn.Module, forward: Callable) -> Callable:
    """A function like `forward`, a method, with the signature of the model's: from it a Trainer learns what columns it takes."""

    def signed_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    vars(signed_forward)["__signature__"] = inspect.signature(type(model).forward)
    return signed_forward


def adopted(model: PeftModel, new: Any) -> Any:
    """What becomes a PeftModel's forward when somebody sets `new`.

    Who sets a method that wraps what is there wraps it. One that does not is written for what the PeftModel is taken for, as
    TRL's is, which calls `self.base_model` for hidden states: it gets the model itself, whose body that is. Where PEFT is
    imported, `self` is known to be a PeftModel.
    """
    there = model.__dict__.get("forward")
    if there is None or getattr(new, "__self__", None) is not model or "peft" in sys.modules:
        return new
    function = new.__func__
    while function is not None and function is not there.__func__:
        function = getattr(function, "__wrapped__", None)
    if function is not None:
        return new
    tuner, inner = model.base_model, MethodType(new.__func__, model.base_model.model)
    return MethodType(
        signed(tuner.model, lambda self, *args, **kwargs: tuner.with_penalty(inner(*args, **kwargs))), model
    )


def unmade(kind: type[Made]) -> Made:
    return kind.__new__(kind)


@functools.cache
def seen(kind: type, others: tuple[type, ...]) -> type:
    """What `isinstance` takes an instance of a class for that is to pass for one of other classes too."""
    if not others:
        return kind

    own: Any = type(kind)

    class Both(own):
        """Bases would not do: transformers' models and PEFT's derive from the same classes in different orders."""

        def mro(cls) -> list[type]:
            each = (super().mro(), *(other.__mro__ for other in others))
            return [*dict.fromkeys(c for found in each for c in found[:-1]), object]

    return Both(kind.__name__, (kind,), {"__module__": kind.__module__})


def derived_from(kind: type, new: type, guise: type) -> type:
    """The class `new`, which derives from what is seen, deriving from what is there."""
    bases = tuple(kind if base is guise else base for base in new.__bases__)
    return type(new.__name__, bases, {k: v for k, v in vars(new).items() if k not in ("__dict__", "__weakref__")})
