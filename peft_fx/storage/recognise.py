"""Which scheme keeps a parameter, asked of a module."""

from __future__ import annotations

import sys

import torch
from torch import nn

from .native.base import NativeLinear
from .packed import SUFFIX, Packed
from .schemes import SCHEMES, scheme


def recognise(module: nn.Module, parameter: str = "weight") -> Packed | None:
    """What keeps a parameter packed: a child of ours, or what a package's layer holds, over its own tensors; None if it is dense.

    Raises StorageError for a layer whose package has repacked it.
    """
    if (own := module._modules.get(parameter + SUFFIX)) is not None:
        return own if isinstance(own, Packed) else None
    if isinstance(module, NativeLinear):
        return module.packed() if parameter == "weight" else None
    if plain(module, parameter):
        return None
    return next((p for n in SCHEMES if (p := scheme(n).recognise(module, parameter)) is not None), None)


def holding(module: nn.Module) -> tuple:
    """What tells whether a module still has the numbers that it had: its tensors, and where these are."""
    lists = getattr(module._modules.get("parametrizations"), "_modules", {}).values()
    tensors = [t for m in (module, *lists) for d in (m._parameters, m._buffers) for t in d.values() if t is not None]
    return (*((id(t), t.data_ptr()) for t in map(inner, tensors)), id(module.__dict__.get("quant_state")))


def inner(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that has an address: of a subclass that packs others, its first one."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    while flatten is not None:
        tensor = getattr(tensor, flatten()[0][0])
        flatten = getattr(tensor, "__tensor_flatten__", None)
    return tensor


def plain(module: nn.Module, parameter: str) -> bool:
    """Whether a module is torch's own around a tensor of torch's own, which most are.

    Not where it lacks the parameter, or has numbers of one byte there: packages put theirs into torch's own layers, too.
    """
    held = module._parameters.get(parameter)
    dense = held is None or (type(held) is nn.Parameter and held.dtype.itemsize > 1)
    own = type(module).__module__.startswith("torch.nn.") and parameter in module._parameters
    return own and dense and not torch.nn.utils.parametrize.is_parametrized(module)


def made_by(thing: object, package: str, *classes: str) -> bool:
    """Whether an object is of one of a package's classes, subclasses included; the package is not imported."""
    if package not in sys.modules:
        return False
    return any(c.__name__ in classes and c.__module__.split(".")[0] == package for c in type(thing).__mro__)
