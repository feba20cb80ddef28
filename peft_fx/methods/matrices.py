"""`Matrices`: the shape of updates that are a product of two matrices over the weight seen as one.

    W' = W + B A        A: (r, n / groups * kernel...), B: (out, r), added to W.flatten(1)
    [W' | b'] = [W | b] + B A         where A has one column more

Serves every operator kind; in a grouped convolution all groups use the same A, each on its own channels.
"""

from __future__ import annotations

import math

import torch

from ..target import Target, sizes
from .base import Additive, Factors, Theta, block_diagonal


class Matrices(Additive):
    def check(self, target, config):
        if len(target.shape) - len(target.kernel) != 2:
            return (
                f"{self.name} adds a product of two matrices; this {target.kind} weight has shape {sizes(target.shape)}"
            )
        return None

    def matrices(self, theta: Theta, target: Target, config) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B, every scale inside them."""
        raise NotImplementedError

    def parts(self, theta: Theta, target: Target, config):
        """A, B and what they add to the bias, None without a column for it."""
        A, B = self.matrices(theta, target, config)
        n = row_size(target)
        return (A, B, None) if A.shape[1] == n else (A[:, :n], B, B @ A[:, n])

    def factors(self, theta, target, config):
        A, B, bias = self.parts(theta, target, config)
        A = A.unflatten(1, target.shape[1:]) if target.kernel else A
        if target.groups > 1:  # each group of outputs sees A on its own channels
            A = block_diagonal(A.repeat(target.groups, *(1,) * (A.dim() - 1)), target.groups)
        return Factors(A, B, B.new_ones(()), bias)

    def weight(self, W, b, theta, target, config):  # type: ignore[override]  # without `out`
        A, B, bias = self.parts(theta | {"W": W} if self.reads else theta, target, config)
        return torch.addmm(W.flatten(1), B, A).reshape(W.shape), b if bias is None else b + bias


def row_size(target: Target) -> int:
    """Columns of the weight seen as a matrix."""
    return math.prod(target.shape[1:])
