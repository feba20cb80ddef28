"""Classes of adapted modules, generated from their own and from ours (`named.py`), and PEFT's where it is imported.

    Linear            nn.Linear with LoRA on it:  its `__class__` becomes
    Linear (ours)     derived from nn.Linear and from `peft_fx.tuners.lora.Linear`, with the name and the module of nn.Linear

As torch's `fully_shard` does, the object stays the one that it was, and `undress` gives it its class back.
"""

from __future__ import annotations

import copyreg
import functools
import sys
from abc import ABCMeta
from typing import Any, NamedTuple, cast

from torch import nn

from ...planning.modules import ADAPTED, own_class
from ..model.guise import derived_from, seen
from .named import operator_class
from .trained import own_or_base
from .wrappers import ModulesToSaveWrapper, TrainableTokensWrapper

MADE_FROM = "_peft_fx_made_from"
WRAPPERS = {"saved": ModulesToSaveWrapper, "tokens": TrainableTokensWrapper}


def of_peft(marker: type) -> type | None:
    """PEFT's class for one of ours, where PEFT is imported: of the same name, or of one that ends so."""
    place, name = getattr(marker, "pefts", ("peft.tuners.tuners_utils", "BaseTunerLayer"))
    module = sys.modules.get(place)
    if module is None:
        return None
    found = vars(module).get(name) or next((c for n, c in vars(module).items() if n.endswith(name)), None)
    base = cast(type, marker.__base__)
    return found if isinstance(found, type) else of_peft(base) if base is not object else None


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


def what_is_seen(self: nn.Module) -> type:
    """What `isinstance` takes an adapted module for: what it is, and PEFT's wrappers, which take no other classes in.

    PEFT's layers do; they learn of ours here, where every `isinstance` that knows them asks first. A class with their properties
    in it, `weight` for one, would be another one to Dynamo.
    """
    kind: type = type(self)
    known = [(marker, of_peft(marker)) for marker in cast(Recipe, made_from(kind)).markers]
    return seen(kind, tuple(pefts for marker, pefts in known if pefts is not None and not taken_in(marker, pefts)))


@functools.cache
def taken_in(marker: type, pefts: type) -> bool:
    """Whether PEFT's class takes ours for a subclass, from now on at the latest."""
    if isinstance(pefts, ABCMeta):
        pefts.register(marker)
    return issubclass(marker, pefts)


def put_class(self: nn.Module, new: type) -> None:
    """What torch's `fully_shard` puts together of a class of its own and the one that it sees."""
    object.__dict__["__class__"].__set__(self, derived_from(type(self), new, self.__class__))


def reduced(self: nn.Module, protocol: Any) -> tuple:
    """For copies and pickles: the class is generated, so they get what it is generated from."""
    kind: type[nn.Module] = next(c for c in type(self).__mro__ if MADE_FROM in vars(c))
    function, args, *rest = cast(tuple, super(kind, self).__reduce_ex__(protocol))
    if function is copyreg.__newobj__ and args[0] is kind:  # type: ignore[attr-defined]  # typeshed lacks it
        return remade, (made_from(kind), *args[1:]), *rest
    return function, args, *rest


def remade(recipe: Recipe, *args: Any) -> nn.Module:
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
