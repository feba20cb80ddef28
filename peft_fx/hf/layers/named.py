"""The layers of every method, from the table of methods: `peft_fx.tuners.lora.LoraLayer`, `.Linear`, ...

They differ in what a look into an adapted module finds: the method's tensors and its config's fields, by adapter.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from itertools import product
from typing import Any, TypeVar

from torch import nn

from ...config import AdapterConfig
from ...methods import INTERNAL, METHODS, get_config, get_method
from ...target import Target
from .base import BaseTunerLayer
from .containers import container, parts
from .fields import by_adapter, names
from .layer import layer_of
from .scales import SCALE, Scaling
from .view import View

Config = TypeVar("Config", bound=AdapterConfig)
# kind of operator -> what PEFT calls the class of a module with it, or how its name ends
KINDS = {
    "linear": "Linear",
    "embedding": "Embedding",
    "conv1d": "Conv1d",
    "conv2d": "Conv2d",
    "conv3d": "Conv3d",
    "expert": "ParamWrapper",
    "attention": "MultiheadAttention",
}
EXAMPLES = [
    Target("x", "weight", kind, (8, 8, *kernel), kind == "embedding", has_bias=kind != "embedding")
    for kind, kernel in {"linear": (), "embedding": (), "conv2d": (3, 3)}.items()
]
EXAMPLES.append(Target("x", "weight", "norm", (8,), has_bias=True))
PARENTS = {"ADALORA": "LORA"}  # whose layers are another method's in PEFT


@functools.cache
def layer_class(peft_type: str) -> type[BaseTunerLayer]:
    """`LoraLayer` for "LORA": modules with the method on them."""
    parent = layer_class(PARENTS[peft_type]) if peft_type in PARENTS else BaseTunerLayer
    name = get_config(peft_type).__name__.removesuffix("Config") + "Layer"
    made_class = made(name, parent, peft_type, f"A module with {peft_type} on it.")
    for attribute, view in views(peft_type).items():
        setattr(made_class, attribute, view)
        view.__set_name__(made_class, attribute)
    return made_class


def learn(peft_type: str, containers: Iterable[str]) -> None:
    """Layers of the method have these too: what only the targets of all an adapter say."""
    kind = layer_class(peft_type)
    for name in containers:
        if not hasattr(kind, name):
            view = View(partial(of_layer, container, name))
            view.__set_name__(kind, name)
            setattr(kind, name, view)


def views(peft_type: str) -> dict[str, View]:
    """What layers of the method have besides: its tensors and its config's fields, by adapter."""
    found, entry = {}, METHODS[peft_type]
    for name in names(get_config(peft_type)):
        for attribute in (name, f"{entry[0]}_{name}") if isinstance(entry, tuple) else (name,):
            found[attribute] = View(partial(of_layer, by_adapter, name))
    found |= {name: View(partial(of_layer, container, name)) for name in tensor_names(peft_type)}
    return found | {SCALE: View(lambda module: Scaling(layer_of(module)))}


def of_layer(function: Callable, name: str, module: nn.Module) -> Any:
    return function(layer_of(module), name)


def tensor_names(peft_type: str) -> list[str]:
    """Names of the containers of a method's tensors, on whatever it can be put on."""
    config = get_config(peft_type)
    methods = [
        get_method(name) for name in (peft_type, *INTERNAL) if getattr(get_method(name), "Config", None) is config
    ]
    found = []
    for method, target in product(methods, EXAMPLES):
        for describe in (method.tensors, lambda t, c, m=method: m.together([t], c).shared):
            with suppress(Exception):  # no form there, or none with the defaults
                specs = describe(target, unchecked(config))
                found += [parts(spec.key or name)[0] for name, spec in specs.items()]
    return [name for name in dict.fromkeys(found) if name != SCALE]


@functools.cache
def operator_class(peft_type: str, kind: str) -> type[BaseTunerLayer]:
    """`Linear` for "LORA" and "linear": modules with the method on an operator of the kind."""
    parent = layer_class(peft_type)
    if not KINDS.get(kind):
        return parent
    return made(KINDS[kind], parent, peft_type, f"A module with {peft_type} on its operator, of kind {kind}.")


def made(name: str, parent: type, peft_type: str, text: str) -> type:
    entry = METHODS[peft_type]
    place = f"peft.tuners.{entry[0]}.layer" if isinstance(entry, tuple) else ""
    return type(name, (parent,), {"__module__": __name__, "__doc__": text, "pefts": (place, name)})


class Names:
    """What PEFT's submodule of one method has: `peft_fx.tuners.lora.LoraLayer`, `.Linear`, ..."""

    def __init__(self, peft_type: str):
        self.peft_type = peft_type

    def __getattr__(self, name: str) -> type:
        layer = layer_class(self.peft_type)
        if name == layer.__name__:
            return layer
        kind = next((k for k, known in KINDS.items() if known and name.endswith(known)), None)
        if kind is None or name.startswith("_"):
            raise AttributeError(name)
        return operator_class(self.peft_type, kind)


def __getattr__(name: str) -> Names:
    """The classes of one method, under the name of its file."""
    for peft_type, entry in METHODS.items():
        if isinstance(entry, tuple) and peft_type not in INTERNAL and entry[0] == name:
            return Names(peft_type)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def unchecked(config: type[Config]) -> Config:
    """One with the defaults, also where these alone are refused."""
    new = object.__new__(config)
    for field in dataclasses.fields(config):
        made = field.default_factory
        setattr(new, field.name, field.default if made is dataclasses.MISSING else made())
    return new
