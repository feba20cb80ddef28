"""A PeftModel's `forward` and `generate` as help() and inspect show the model's own. PEFT's names."""

from __future__ import annotations

import functools
import inspect
from types import MethodType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..model.model import PeftModel

METHODS = ("forward", "generate")


def update_forward_signature(model: PeftModel) -> None:
    """Gives the PeftModel's forward the signature and docstring of the model's."""
    adopt(model, "forward")


def update_generate_signature(model: PeftModel) -> None:
    """Gives the PeftModel's generate the signature and docstring of the model's, where it has one."""
    if hasattr(model.get_base_model(), "generate"):
        adopt(model, "generate")


def update_signature(model: PeftModel, method: str = "all") -> None:
    """method: "forward", "generate" or "all". Raises ValueError for any other."""
    if method not in (*METHODS, "all"):
        raise ValueError(f"method={method!r}: expected one of {(*METHODS, 'all')}")
    if method != "generate":
        update_forward_signature(model)
    if method != "forward":
        update_generate_signature(model)


def adopt(model: PeftModel, name: str) -> None:
    """An attribute of the instance that calls what its class has, and looks like what the model's class has."""

    @functools.wraps(getattr(type(model.get_base_model()), name))
    def method(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
        return inspect.getattr_static(type(self), name).__get__(self, type(self))(*args, **kwargs)

    setattr(model, name, MethodType(method, model))
