"""The tensors of resident adapters as modules: `adapters.<adapter>.<module>.on_<parameter>.<tensor>`.

What follows from the config alone, scales for instance, is no state: it is in no state dict, so that another config's cannot
come with one, and it is made anew where a module's tensors were cast, or came into memory without numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from ..methods.base import Tensor
from ..methods.padding import pad_to

PROBE = torch.arange(1, 9) * 0x9E3779B97F4A7C15 % 2**62  # what memory without numbers does not hold by chance


class Derived(NamedTuple):
    """How a tensor is made. base: the dtype that the weight had which it was made for."""

    spec: Tensor
    base: torch.dtype


class Adapters(nn.Module):
    """One child per adapter."""

    def forward(self, x):
        """What it gets: a model that calls all its children one after the other, as nn.Sequential, comes to it last."""
        return x

    def __repr__(self) -> str:
        # a module for each part of each tensor's name is nothing to read
        return f"Adapters({', '.join(self._modules)})"


class Adapter(nn.Module):
    """The tensors of one adapter. derived: name below this module -> how it is made; one dict for all graphs that share them."""

    def __init__(self):
        super().__init__()
        self.derived: dict[str, Derived] = {}

    def _apply(self, fn, recurse=True):
        before = {name: tensor.dtype for name, tensor in self.named_buffers(remove_duplicate=False)}
        super()._apply(fn, recurse)
        if self.derived:
            self.renew({} if not torch.equal(known(fn(PROBE)), PROBE) else before)
        return self

    @torch.no_grad()
    def renew(self, kept: dict[str, torch.dtype]) -> None:
        """Makes derived tensors anew, but for those that still have this dtype, whose numbers are their own."""
        found = dict(self.named_buffers(remove_duplicate=False))
        with torch.random.fork_rng(devices=()):
            for name, (spec, base) in self.derived.items():
                tensor = found.get(name)
                if tensor is None or tensor.is_meta or tensor.dtype == kept.get(name):
                    continue
                made = torch.empty(spec.shape, dtype=tensor.dtype, device=tensor.device)
                no_weight = made.new_empty((*spec.shape[: spec.stacked], 0), dtype=base)
                spec.init(made, no_weight)
                tensor.copy_(pad_to(made, tuple(tensor.shape), spec.pad))


def known(probe: torch.Tensor) -> torch.Tensor:
    """The probe's numbers, wherever it was moved to."""
    return torch.zeros_like(PROBE) if probe.is_meta else probe.cpu()


def adapter_of(adapters: nn.Module, name: str) -> Adapter:
    """The module of an adapter; what another tool's pass made of it, or nothing, becomes one."""
    found = adapters._modules.get(name)
    if not isinstance(found, Adapter):
        new = Adapter()
        new.__dict__.update(found.__dict__ if found is not None else {"training": adapters.training})
        adapters._modules[name] = found = new
    return found
