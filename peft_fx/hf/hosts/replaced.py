"""Weights of a model that adapters were folded into, and what was there before, bit for bit."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from ...store.tensors import get_tensor, owner_of
from ...verbs.backend import Backend


class Replaced:
    """Of one model. before: name -> a copy of the numbers, or the Parameter that another one stands for; None: there was none."""

    def __init__(self, model: nn.Module, backend: Backend):
        self.model, self.backend = model, backend
        self.before: dict[str, torch.Tensor | None] = {}

    @torch.no_grad()
    def write(self, values: dict[str, torch.Tensor]) -> None:
        """Name -> value in place of the model's parameters."""
        for name, value in values.items():
            old = get_tensor(self.model, name)
            tied = bool(self.backend.state.table.tied_to(name))
            if old is not None and old.shape == value.shape and not tied:
                self.before.setdefault(name, old.detach().clone())
                old.copy_(value)
            else:  # a weight that others share, a bias that there was none of, a convolution that loses its groups
                self.before.setdefault(name, old)
                self.put(name, nn.Parameter(value, requires_grad=False))

    @torch.no_grad()
    def undo(self, names: Iterable[str] | None = None) -> None:
        """names: of the parameters that get back what they were; None: all that are replaced."""
        for name in [n for n in self.before if names is None or n in names]:
            old = self.before.pop(name)
            if old is None or isinstance(old, nn.Parameter):
                self.put(name, old)
            else:
                get_tensor(self.model, name).copy_(old)

    def put(self, name: str, parameter: nn.Parameter | None) -> None:
        """Another Parameter under a name of the model's, None to take it away."""
        for root in (self.model, self.backend.adapters):
            owner, leaf = owner_of(root, name)
            owner._parameters[leaf] = parameter
        owner = owner_of(self.model, name)[0]
        if parameter is not None and parameter.dim() > 2 and hasattr(owner, "groups"):
            owner.groups = owner.in_channels // parameter.shape[0 if owner.transposed else 1]
