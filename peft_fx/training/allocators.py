"""What adapters do while they train, whatever their methods: work after a step, and a term of the loss.

    work = allocators(graph)
    (loss + penalty(graph)).backward(); optimizer.step()
    for each in work.values(): each.update_and_allocate(step)
    optimizer.zero_grad()

A PeftModel adds the term to its outputs' loss itself and has `update_and_allocate`, which `AllocatorCallback` calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, Protocol, cast

import torch
from torch import fx

from ..config import AdapterConfig
from ..store.state import state_of
from .adalora import RankAllocator, orthogonality
from .adamss import SubspaceAllocator

if TYPE_CHECKING:
    from ..methods.adamss import AdamssConfig


class Allocator(Protocol):
    """Of one adapter."""

    def update_and_allocate(self, step: int) -> None:
        """Call once per training step, after `optimizer.step` and before `zero_grad`."""


class Work(NamedTuple):
    """Of one method. of, penalty: (graph, adapter) -> its allocator, a term of the loss. wanted: whether a config asks for it."""

    of: Callable[[fx.GraphModule, str], Allocator]
    wanted: Callable[[AdapterConfig], bool] = lambda config: True
    penalty: Callable[[fx.GraphModule, str], torch.Tensor] | None = None


WORK = {
    "ADALORA": Work(RankAllocator, penalty=orthogonality),
    "ADAMSS": Work(SubspaceAllocator, wanted=lambda config: cast("AdamssConfig", config).use_asa),
}


def work_of(tuned: fx.GraphModule) -> dict[str, Work]:
    """Adapter -> what it does while it trains, of those that act and do something."""
    state = state_of(tuned)
    configs = {name: state.recipe[name].config for name in state.acting}
    found = {name: WORK[c.peft_type] for name, c in configs.items() if c.peft_type in WORK}
    return {name: work for name, work in found.items() if work.wanted(configs[name])}


def allocators(tuned: fx.GraphModule, made: dict[str, Allocator] | None = None) -> dict[str, Allocator]:
    """Adapter -> its allocator; {} where no method has any work. made: those that there are: they remember importance."""
    made = made or {}
    return {name: made.get(name) or work.of(tuned, name) for name, work in work_of(tuned).items()}


def penalty(tuned: fx.GraphModule) -> torch.Tensor | float:
    """What the methods add to the loss; 0.0 where none does."""
    return sum((work.penalty(tuned, name) for name, work in work_of(tuned).items() if work.penalty), 0.0)
