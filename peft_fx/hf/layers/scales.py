"""Scales of the adapters on one module: tensors, written in place, so that nothing is compiled again."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, MutableMapping
from contextlib import ExitStack

import torch

from ...methods.scales import fixed
from ...planning.plan import Placement
from ...store.resident import adapter_of
from .layer import Layer

SCALE = "scaling"


class Scaling(MutableMapping):
    """Adapter -> its scale on the module; setting an item writes the tensor."""

    def __init__(self, layer: Layer):
        self.layer = layer
        self.scaled = {p.adapter: p for p in scaled(layer, layer.placed)}

    def __getitem__(self, adapter: str) -> float:
        return float(self.layer.tensor(self.scaled[adapter], SCALE))

    def __setitem__(self, adapter: str, value: float) -> None:
        if adapter not in self.scaled:
            raise KeyError(f"no adapter {adapter!r} on {self.layer.path}; there are: {', '.join(self.scaled) or 'none'}")
        write_scale(self.layer, self.scaled[adapter], float(value))

    def __delitem__(self, adapter: str) -> None:
        raise TypeError(f"{self.layer.path}: the scale of {adapter!r} goes with its adapter: delete_adapter({adapter!r})")

    def __iter__(self) -> Iterator[str]:
        return iter(self.scaled)

    def __len__(self) -> int:
        return len(self.scaled)

    def __repr__(self) -> str:
        return repr(dict(self))


def scaled(layer: Layer, adapters: Iterable[str]) -> list[Placement]:
    """Those placements of the adapters that have a scale. Raises TypeError where an adapter's method has none."""
    found = []
    for name in adapters:
        placements = layer.updates(name)
        having = [p for p in placements if SCALE in p.tensors]
        if placements and not having:
            raise TypeError(f"{layer.path}: {placements[0].config.peft_type} ({name!r}) has no scale to change")
        found += having
    return found


def initial(p: Placement) -> float:
    """What the config says."""
    value = torch.empty((), dtype=torch.float64)
    p.tensors[SCALE].init(value, None)
    return float(value)


@torch.no_grad()
def write_scale(layer: Layer, p: Placement, value: float) -> None:
    """After the forwards that run, or at once inside one: its own adapters' scales are the caller's business."""
    store = layer.tuner.backend.adapters.peft_fx
    tensor = layer.tensor(p, SCALE)
    with ExitStack() as stack:
        if threading.get_ident() not in store.sharing.forwards:
            stack.enter_context(store.sharing.swapping())
            stack.enter_context(store.sharing.writing([tensor]))
        tensor.fill_(value)
        # a cast makes it anew from this
        derived = adapter_of(store.adapters, p.adapter).derived
        name = p.resolve(SCALE).name.partition(".")[2]
        if name in derived:
            derived[name] = derived[name]._replace(spec=fixed(value))
    layer.rescaled = True
