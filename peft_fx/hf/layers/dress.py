"""Who is of which class: adapted modules are recognised by tools that ask for PEFT's layers and wrappers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import nn

from ...planning.plan import Placement
from ...planning.selection import choose_saved
from ..hosts.bindings import at
from ..hosts.raw import PLAIN
from .classes import put_on
from .containers import containers
from .layer import ATTRIBUTE, SUBSTITUTES, Layer
from .named import learn
from .trained import TRAINED, Reading

if TYPE_CHECKING:
    from ..model.tuner import Tuner

CHILD = "peft_adapters"  # an adapted model's submodule that holds the adapters' tensors
DRESSED = "_dressed"  # where a tuner has module -> Layer; `layers` would hide the model's own of that name


def dress(tuner: Tuner) -> None:
    """After adapters came, went, or others act: every adapted module is of the classes for what is on it."""
    found = {at(tuner.model, path): layer for path, layer in layers_of(tuner).items()}
    layers = {module: layer for module, layer in found.items() if module is not None}
    before = tuner.__dict__.get(DRESSED, {})
    for module in before.keys() - layers.keys():
        undress(module)
    tuner.__dict__[DRESSED] = layers
    for module, layer in layers.items():
        module.__dict__[ATTRIBUTE] = layer
        module.__dict__[TRAINED] = readings(layer)
        put_on(module, on_it(layer), tuple(sorted({p.target.parameter for p in substitutes(layer)})))


def undress(module: nn.Module) -> None:
    """The module is of its own class again."""
    for name in (ATTRIBUTE, TRAINED, PLAIN):
        module.__dict__.pop(name, None)
    put_on(module)


def undress_all(model: nn.Module) -> None:
    for module in model.modules():
        if ATTRIBUTE in module.__dict__:
            undress(module)


@contextmanager
def undressed(tuner: Tuner) -> Iterator[None]:
    """Inside the block modules are of their own classes, and the adapters no part of the model, as a capture wants it."""
    undress_all(tuner.model)
    tuner.model._modules.pop(CHILD)
    try:
        yield
    finally:
        tuner.model._modules[CHILD] = tuner.adapters
        dress(tuner)


def layers_of(tuner: Tuner) -> dict[str, Layer]:
    """Path -> what is on the module there, in the order of adapters and their targets."""
    state = tuner.backend.state
    layers: dict[str, Layer] = {}
    for adapter, resident in state.recipe.items():
        for p in resident.placements:
            layer = layers.setdefault(p.target.path, Layer(tuner, p.target.path))
            layer.placed.setdefault(adapter, []).append(p)
        for saved in choose_saved(state.table, resident.config)[0]:
            layers.setdefault(saved.path, Layer(tuner, saved.path)).saved += (adapter,)
    return layers


def on_it(layer: Layer) -> tuple[tuple[str, str], ...]:
    """What `Recipe` takes."""
    attention = layer.tuner.backend.state.table[layer.path].is_a("MultiheadAttention")
    placed = [p for name in layer.placed for p in layer.updates(name)]
    for method in dict.fromkeys(str(p.config.peft_type) for p in placed):
        learn(method, (*containers(layer, True), *containers(layer, False)))
    found = [(str(p.config.peft_type), "attention" if attention else p.target.kind) for p in placed]
    found += [("", kind) for p in substitutes(layer) if (kind := SUBSTITUTES[p.method])]
    return (*dict.fromkeys(found), *[("", "saved")] * bool(layer.saved))


def substitutes(layer: Layer) -> list[Placement]:
    return [p for name in layer.placed for p in layer.substitutes(name)]


def readings(layer: Layer) -> dict[str, Reading]:
    """Parameter name -> what is read in its place while the acting adapters act."""
    found: dict[str, list[Placement]] = {}
    for name in layer.acting:
        for p in layer.substitutes(name):
            found.setdefault(p.target.parameter, []).append(p)
    return {name: Reading(layer, tuple(group)) for name, group in found.items()}
