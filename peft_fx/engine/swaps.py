"""An adapter that is ready to be swapped in, and what a swap did."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..config import AdapterConfig
from ..folding import folded_names
from ..planning.plan import Plan
from ..tables import Shown, Table, counted


@dataclass(frozen=True, repr=False)
class SwapReport(Shown):
    """What a swap wrote. padded: tensors smaller than their slot. zeroed: targets that the new adapter leaves out.

    Of a merged adapter `tensors` counts folded weights and biases, and `zeroed` have their base weight again.
    """

    adapter: str
    source: str
    tensors: int
    elements: int
    padded: int
    zeroed: tuple[str, ...]
    seconds: float

    def parts(self) -> list[str | Table]:
        what = f"{counted(self.tensors, 'tensor')}, {counted(self.elements, 'number')}, in {1000 * self.seconds:.1f} ms"
        return [f"adapter {self.adapter!r} from {self.source}: {what}{fitting(self.padded, self.zeroed)}"]


@dataclass(frozen=True, repr=False)
class Swap(Shown):
    """An adapter in memory, checked and padded for the slots of one graph, from `prepare_swap`.

    names: the state names of the tensors to write. home: of the resident adapter whose tensors it was made for.
    """

    adapter: str
    slot: str
    source: str
    config: AdapterConfig
    plan: Plan
    names: tuple[str, ...]
    values: tuple[torch.Tensor, ...]
    padded: int
    zeroed: tuple[str, ...]
    home: object

    def parts(self) -> list[str | Table]:
        what = f"{counted(len(self.values), 'tensor')} for {self.slot!r}{fitting(self.padded, self.zeroed)}"
        return [f"adapter {self.adapter!r} from {self.source}, ready to be swapped in by hotswap(graph, swap): {what}"]


def fitting(padded: int, zeroed: tuple[str, ...]) -> str:
    """What was done so that an adapter fits its slot."""
    facts = [f"{counted(padded, 'tensor')} padded"] if padded else []
    facts += [f"{counted(len(zeroed), 'target')} left out: {', '.join(folded_names(zeroed))}"] if zeroed else []
    return "".join(f"; {fact}" for fact in facts)
