"""Classes of adapted modules, from the table of methods: `LoraLayer`, `Linear`, ... and PEFT's own where it is imported.

    Linear            nn.Linear with LoRA on it:  its `__class__` becomes
    Linear (ours)     derived from nn.Linear and from `peft_fx.tuners.lora.Linear`, with the name and the module of nn.Linear

As torch's `fully_shard` does, the object stays the one that it was, and `undress` gives it its class back.
"""

from __future__ import annotations

import copyreg
import dataclasses
import functools
import sys
from abc import ABCMeta
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from itertools import product
from typing import NamedTuple

from torch import nn

from ...methods import INTERNAL, METHODS, get_config, get_method
from ...planning.modules import ADAPTED, own_class
from ...target import Target
from ..model.guise import derived_from, seen
from .base import BaseTunerLayer
from .containers import container, parts
from .fields import by_adapter, names
from .layer import layer_of
from .scales import SCALE, Scaling
from .trained import own_or_base
from .view import View
from .wrappers import ModulesToSaveWrapper, TrainableTokensWrapper

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
MADE_FROM = "_peft_fx_made_from"
WRAPPERS = {"saved": ModulesToSaveWrapper, "tokens": TrainableTokensWrapper}
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


def of_layer(function: Callable, name: str, module: nn.Module):
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


def __getattr__(name: str):
    """The classes of one method, under the name of its file."""
    for peft_type, entry in METHODS.items():
        if isinstance(entry, tuple) and peft_type not in INTERNAL and entry[0] == name:
            return Names(peft_type)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def unchecked(config: type):
    """One with the defaults, also where these alone are refused."""
    new = object.__new__(config)
    for field in dataclasses.fields(config):
        made = field.default_factory
        setattr(new, field.name, field.default if made is dataclasses.MISSING else made())
    return new


def of_peft(marker: type) -> type | None:
    """PEFT's class for one of ours, where PEFT is imported: of the same name, or of one that ends so."""
    place, name = getattr(marker, "pefts", ("peft.tuners.tuners_utils", "BaseTunerLayer"))
    module = sys.modules.get(place)
    if module is None:
        return None
    found = vars(module).get(name) or next((c for n, c in vars(module).items() if n.endswith(name)), None)
    return found if isinstance(found, type) else of_peft(marker.__base__) if marker.__base__ is not object else None


def marker(peft_type: str, kind: str) -> type:
    return WRAPPERS[kind] if kind in WRAPPERS else operator_class(peft_type, kind)


class Recipe(NamedTuple):
    """What an adapted module's class is made from: plain data, for pickles.

    origin: the module's own class; on_it: (peft_type, kind of operator) or ("", wrapper); substituted: parameters that an
    adapter's own may stand for.
    """

    origin: type
    on_it: tuple[tuple[str, str], ...]
    substituted: tuple[str, ...] = ()

    @property
    def markers(self) -> tuple[type, ...]:
        """Most derived first, as Python wants bases."""
        return tuple(sorted(dict.fromkeys(marker(*key) for key in self.on_it), key=lambda m: -len(m.__mro__)))


@functools.cache
def adapted_class(recipe: Recipe) -> type:
    """The class of modules of class `origin` that are of these classes of ours too."""
    origin = recipe.origin
    names = {
        "__module__": origin.__module__,  # Dynamo knows torch's own modules by it
        "__qualname__": origin.__qualname__,
        "__doc__": origin.__doc__,
        "__reduce_ex__": reduced,
        "__class__": property(what_is_seen, put_class),
        ADAPTED: origin,
        MADE_FROM: recipe,
    }
    return type(origin)(
        origin.__name__, (origin, *recipe.markers), names | {n: own_or_base(n) for n in recipe.substituted}
    )


def made_from(kind: type) -> Recipe | None:
    return getattr(kind, MADE_FROM, None)


def what_is_seen(self) -> type:
    """What `isinstance` takes an adapted module for: what it is, and PEFT's wrappers, which take no other classes in.

    PEFT's layers do; they learn of ours here, where every `isinstance` that knows them asks first. A class with their properties
    in it, `weight` for one, would be another one to Dynamo.
    """
    kind = type(self)
    known = [(marker, of_peft(marker)) for marker in made_from(kind).markers]
    return seen(kind, tuple(pefts for marker, pefts in known if pefts is not None and not taken_in(marker, pefts)))


@functools.cache
def taken_in(marker: type, pefts: type) -> bool:
    """Whether PEFT's class takes ours for a subclass, from now on at the latest."""
    if isinstance(pefts, ABCMeta):
        pefts.register(marker)
    return issubclass(marker, pefts)


def put_class(self, new: type) -> None:
    """What torch's `fully_shard` puts together of a class of its own and the one that it sees."""
    object.__dict__["__class__"].__set__(self, derived_from(type(self), new, self.__class__))


def reduced(self, protocol):
    """For copies and pickles: the class is generated, so they get what it is generated from."""
    kind = next(c for c in type(self).__mro__ if MADE_FROM in vars(c))
    function, args, *rest = super(kind, self).__reduce_ex__(protocol)
    if function is copyreg.__newobj__ and args[0] is kind:
        return remade, (made_from(kind), *args[1:]), *rest
    return function, args, *rest


def remade(recipe: Recipe, *args) -> nn.Module:
    kind = adapted_class(recipe)
    return kind.__new__(kind, *args)


def put_on(module: nn.Module, on_it: tuple[tuple[str, str], ...] = (), substituted: tuple[str, ...] = ()) -> None:
    """The module becomes of these classes of ours too, in place of those that it is of now."""
    kind = type(module)
    if made_from(kind) is not None and MADE_FROM not in vars(kind):
        return  # somebody derived a class of it meanwhile
    recipe = Recipe(own_class(module), on_it, substituted)
    new = adapted_class(recipe) if on_it or substituted else recipe.origin
    if kind is not new:
        object.__dict__["__class__"].__set__(module, new)
