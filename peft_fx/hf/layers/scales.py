"""Scales of the adapters on one module: tensors, written in place, so that nothing is compiled again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping

import torch

from ...methods.base import Tensor
from ...methods.scales import fixed
from ...planning.plan import Placement
from ...store.resident import adapter_of
from .layer import Layer

SCALE = "scaling"


class Scaling(MutableMapping):
    """Adapter -> its scale on the module; setting an item writes the tensor."""

    def __init__(self, layer: Layer):
        self.layer = layer
        placed = (p for name in layer.placed for p in layer.updates(name))
        self.scaled = {p.adapter: p for p in placed if SCALE in p.tensors}

    def __getitem__(self, adapter: str) -> float:
        return scale_of(self.layer, self.scaled[adapter])

    def __setitem__(self, adapter: str, value: float) -> None:
        if adapter not in self.scaled:
            raise KeyError(
                f"no adapter {adapter!r} on {self.layer.path}; there are: {', '.join(self.scaled) or 'none'}"
            )
        write_scale(self.layer, self.scaled[adapter], float(value))

    def __delitem__(self, adapter: str) -> None:
        raise TypeError(
            f"{self.layer.path}: the scale of {adapter!r} goes with its adapter: delete_adapter({adapter!r})"
        )

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


def write_scale(layer: Layer, p: Placement, value: float) -> None:
    """After the forwards that run; inside one, for what that thread calls next."""
    tensor = layer.tensor(p, SCALE)
    layer.put({tensor: torch.full_like(tensor, value)})
    # a cast makes it anew from this
    derived = adapter_of(layer.tuner.adapters, p.adapter).derived
    name = p.resolve(SCALE).name.partition(".")[2]
    if name in derived:
        derived[name] = derived[name]._replace(spec=fixed(value))
    layer.rescaled = True


def scale_of(layer: Layer, p: Placement) -> float:
    """The number that the tensor was made from, where it is still that one: with no rounding of the tensor's in it."""
    tensor = layer.tensor(p, SCALE)
    derived = adapter_of(layer.tuner.adapters, p.adapter).derived
    spec = derived.get(p.resolve(SCALE).name.partition(".")[2])
    exact = initial(spec.spec if spec else p.tensors[SCALE])
    return exact if torch.tensor(exact).to(tensor.dtype) == tensor.cpu() else float(tensor)


def initial(spec: Tensor) -> float:
    """What the config says, or was written last."""
    value = torch.empty((), dtype=torch.float64)
    spec.init(value, None)
    return float(value)
