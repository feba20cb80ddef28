"""What a PeftModel is taken for: one of its model's class and of PEFT's, with its model's signature."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

from torch import nn


def signed(model: nn.Module, forward: Callable) -> Callable:
    """A function like `forward`, a method, with the signature of the model's: from it a Trainer learns what columns it takes."""

    def signed_forward(self, *args, **kwargs):
        return forward(self, *args, **kwargs)

    signed_forward.__signature__ = inspect.signature(type(model).forward)
    return signed_forward


def unmade(kind: type):
    return kind.__new__(kind)


@functools.cache
def seen(kind: type, peft) -> type:
    """What `isinstance` takes a PeftModel around a model of this class for. peft: the module, None if nobody has imported it."""
    if peft is None:
        return kind

    class Both(type(kind)):
        """Bases would not do: transformers' models and PEFT's derive from the same classes in different orders."""

        def mro(cls):
            return [*dict.fromkeys((*super().mro()[:-1], *peft.PeftModel.__mro__))]

    return Both(kind.__name__, (kind,), {"__module__": kind.__module__})


def derived_from(kind: type, new: type, guise: type) -> type:
    """The class `new`, which derives from what is seen, deriving from what is there."""
    bases = tuple(kind if base is guise else base for base in new.__bases__)
    return type(new.__name__, bases, {k: v for k, v in vars(new).items() if k not in ("__dict__", "__weakref__")})
