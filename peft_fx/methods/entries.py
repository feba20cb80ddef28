"""Updates of single entries of the weight seen as a matrix, (out, in / groups * kernel).

    W' = W, with values[i] added at (row[i], column[i])
    y' = y, with values[i] x[column[i]] added at row[i]

A method says which tensors hold the values and their cells.
"""

from __future__ import annotations

import torch

from ..target import Target
from .base import Branch, Theta
from .matrices import row_size


class Entries(Branch):
    refuses = {"norm": "{name} changes entries of one matrix, not of {shape}; name the norm in modules_to_save"}
    rounds_weight = True
    values: str  # name of the tensor with the values

    def numbers(self, theta: Theta) -> torch.Tensor:
        return theta[self.values]

    def cells(self, theta: Theta, target: Target) -> tuple[torch.Tensor, torch.Tensor]:
        """Row and column of each value."""
        raise NotImplementedError

    def delta(self, x, theta, target, config):
        row, column = self.cells(theta, target)
        features = x.reshape(-1, x.shape[-1]).mT.contiguous()  # whole rows are read and added: several times as fast
        products = features.index_select(0, column) * self.numbers(theta).unsqueeze(1)
        dy = x.new_zeros(target.out_features, features.shape[1]).index_add(0, row, products)
        return dy.mT.reshape(*x.shape[:-1], target.out_features)

    def weight(self, W, b, theta, target, config):
        row, column = self.cells(theta, target)
        return W.flatten().scatter_add(0, row * row_size(target) + column, self.numbers(theta)).reshape(W.shape), b
