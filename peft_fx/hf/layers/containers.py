"""An adapter's tensors under the names that they have in PEFT's layers: `lora_A[adapter].weight`, `ia3_l[adapter]`, ...

The names are those of the files: `lora_A.weight` is the weight of a module, `ia3_l` a parameter. What is handed out is made at
each look, over the adapter's own tensors: writing into them, moving them and giving them another Parameter has effect; what
would have none is refused.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import MappingProxyType
from typing import Any, NoReturn, TypeVar, cast

import torch
from torch import nn

from ...planning.plan import ROOT_KEY, Placement
from .layer import Layer

Fixed = TypeVar("Fixed", nn.ModuleDict, nn.ParameterDict)
PLACES = "_peft_fx_places"  # of a module that is handed out: parameter -> (module that has it, name there)
LEAVES = {"lora_magnitude_vector": "weight"}  # PEFT's files leave these out


def parts(key: str) -> tuple[str, str]:
    """A file key's suffix as the name of a container and of a parameter of the modules in it; "": it holds the tensors itself."""
    name, _, leaf = key.removeprefix(ROOT_KEY).lstrip(".").partition(".")
    return name, leaf or LEAVES.get(name, "")


def contained(layer: Layer) -> Iterator[tuple[str, str, Placement, str]]:
    """(container, leaf, placement, tensor) of all tensors on the module that files name."""
    for adapter in layer.placed:
        for p in layer.updates(adapter):
            for name, spec in p.tensors.items():
                if spec.key is not None or name in p.shared:
                    yield (*parts(spec.key or name), p, name)


def containers(layer: Layer, trained: bool) -> tuple[str, ...]:
    """Names of those that hold trained tensors, or others."""
    return tuple(dict.fromkeys(c for c, _, p, name in contained(layer) if p.tensors[name].trainable is trained))


def container(layer: Layer, wanted: str) -> nn.Module | MappingProxyType:
    """Adapter -> its module, or its tensor, under this name."""
    modules: dict[str, dict[str, tuple[Placement, str]]] = {}
    tensors: dict[str, torch.Tensor] = {}
    for name, leaf, p, tensor in contained(layer):
        if name == wanted and leaf:
            modules.setdefault(p.adapter, {})[leaf] = p, tensor
        elif name == wanted:
            tensors[p.adapter] = layer.tensor(p, tensor)
    if modules:
        return fixed_dict(nn.ModuleDict, {adapter: module_of(layer, found) for adapter, found in modules.items()})
    if all(isinstance(t, nn.Parameter) for t in tensors.values()):
        return fixed_dict(nn.ParameterDict, tensors)
    return MappingProxyType(tensors)


def module_of(layer: Layer, found: dict[str, tuple[Placement, str]]) -> nn.Module:
    """A module over an adapter's tensors, which can be called where its weight says how."""
    tensors = {leaf: layer.tensor(p, name) for leaf, (p, name) in found.items()}
    new = operator(tensors.get("weight"), "bias" in tensors, layer.module)
    for leaf, tensor in tensors.items():
        kind = "_parameters" if isinstance(tensor, nn.Parameter) else "_buffers"
        new.__dict__[kind][leaf] = tensor
    new.__dict__[PLACES] = {leaf: layer.place(p, name) for leaf, (p, name) in found.items()}
    return new.train(layer.module.training)


def operator(weight: torch.Tensor | None, bias: bool, base: nn.Module) -> nn.Module:
    """A module of torch's with a weight of this shape. base: a convolution, of which the first of two factors has the rest."""
    if weight is None or weight.dim() not in (2, 3, 4, 5):
        return written(nn.Module)()
    if weight.dim() == 2:
        return written(nn.Linear)(*reversed(weight.shape), bias=bias, device="meta")
    conv = getattr(nn, f"Conv{weight.dim() - 2}d")
    rest = {}
    if isinstance(base, conv) and weight.shape[2:] == base.weight.shape[2:] and set(weight.shape[2:]) != {1}:
        rest = {name: getattr(base, name) for name in ("stride", "padding", "dilation", "padding_mode")}
    return written(conv)(weight.shape[1], weight.shape[0], weight.shape[2:], bias=bias, device="meta", **rest)


@functools.cache
def written(cls: type[nn.Module]) -> type[nn.Module]:
    """The class, of modules whose Parameters are given to whom they belong when others are set."""

    def __setattr__(self: nn.Module, name: str, value: Any) -> None:
        owner, leaf = self.__dict__.get(PLACES, {}).get(name, (None, ""))
        if owner is not None:
            setattr(owner, leaf, value)
        cls.__setattr__(self, name, value)

    return type(cls.__name__, (cls,), {"__module__": cls.__module__, "__setattr__": __setattr__})


@functools.cache
def fixed_class(cls: type) -> type:
    def refuse(self: nn.Module, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(
            "adapters are added and deleted through the model: add_adapter, delete_adapter; write into the tensors"
        )

    names = dict.fromkeys(("__setitem__", "__delitem__", "update", "pop", "clear", "setdefault", "popitem"), refuse)
    return type(cls.__name__, (cls,), {"__module__": cls.__module__, **names})


def fixed_dict(cls: type[Fixed], items: dict) -> Fixed:
    """A ModuleDict or ParameterDict whose items cannot be replaced: nobody else would see it."""
    new = cls(items)
    object.__dict__["__class__"].__set__(new, fixed_class(cast(type, cls)))
    return new
