"""Adapters' tensors that accelerate keeps elsewhere. Its hooks bring a module's for its call; no adapter's module is called."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from ...planning.plan import Placement
from ...store.tensors import ADAPTERS, owner_of

HOOK = "_hf_hook"  # where accelerate keeps a module's


@contextmanager
def brought(owners: Iterable[nn.Module]) -> Iterator[None]:
    """Inside the block the tensors of these modules are where their hooks bring them for a call."""
    hooked = [module for module in dict.fromkeys(owners) if HOOK in module.__dict__]
    for module in hooked:
        module.__dict__[HOOK].pre_forward(module)
    try:
        yield
    finally:
        for module in hooked:
            module.__dict__[HOOK].post_forward(module, None)


def owners(adapters: nn.Module, placements: Iterable[Placement]) -> list[nn.Module]:
    """The modules that hold the tensors of the placements."""
    return [owner_of(adapters, f"{ADAPTERS}.{p.resolve(name).name}")[0] for p in placements for name in p.tensors]
