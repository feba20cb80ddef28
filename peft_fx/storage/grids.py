"""What a packed weight can be made of, number by number, and which of it is nearest.

    W[o, i] = levels[q[o, i]] * scale[o, i] + offset[o, i]

Rounding one number after the other is blind to what the weight is for. `compensated` rounds column by column and moves what
is lost into the columns that are still to come, so that the product with given inputs stays: GPTQ, arXiv:2210.17323,

    minimise ||X (W - round(W))ᵀ||         with  H = XᵀX + damping,  U = chol(H⁻¹)ᵀ
    W[:, j+1:] -= (W[:, j] - round(W[:, j])) / U[j, j]  U[j, j+1:]

with columns in the order of their inputs' power, and scales that stay: a group may lie anywhere.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

BLOCK = 128  # columns whose losses are gathered before they are moved on
DAMPING = 0.01  # of H's mean diagonal


class Grid(NamedTuple):
    """levels (L,), in the order of the codes. scale, offset: floating, broadcast to the weight."""

    levels: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor

    def over(self, shape: tuple[int, ...]) -> Grid:
        """The same with a scale and an offset for each number."""
        return Grid(self.levels, self.scale.expand(shape), self.offset.expand(shape))

    def numbers(self, codes: torch.Tensor) -> torch.Tensor:
        """What codes, of the weight's shape, stand for."""
        return self.levels.to(self.scale.dtype)[codes.long()] * self.scale + self.offset

    def nearest(self, W: torch.Tensor) -> torch.Tensor:
        """The code of the number nearest to each of W's, int64; of two that are as near, the lower level's."""
        ordered, order = self.levels.to(W.dtype).sort()
        scaled = (W - self.offset) / torch.where(self.scale == 0, 1, self.scale)
        return order[torch.bucketize(scaled.contiguous(), (ordered[1:] + ordered[:-1]) / 2)]


def compensated(W: torch.Tensor, grid: Grid, H: torch.Tensor) -> torch.Tensor:
    """Codes (out, in) of W (out, in) on a grid over it. H (in, in): XᵀX of the inputs that the product is to hold for.

    Inputs that are always 0 have numbers that do not matter: they get the nearest.
    """
    order = H.diagonal().argsort(descending=True)
    U = inverse_root(H[order][:, order].double()).to(W.dtype)
    W = W[:, order]  # a copy: it is written to
    levels, scale, offset = grid.over(W.shape)
    scale, offset = scale[:, order], offset[:, order]
    codes = torch.empty(W.shape, dtype=torch.int64, device=W.device)
    for start in range(0, W.shape[1], BLOCK):
        block = W[:, start : start + BLOCK]
        lost = torch.empty_like(block)
        for i in range(block.shape[1]):
            j = start + i
            column = Grid(levels, scale[:, j], offset[:, j])
            codes[:, j] = column.nearest(block[:, i])
            lost[:, i] = (block[:, i] - column.numbers(codes[:, j])) / U[j, j]
            block[:, i + 1 :] -= lost[:, i, None] * U[j, j + 1 : start + block.shape[1]]
        W[:, start + BLOCK :] -= lost @ U[start : start + BLOCK, start + BLOCK :]
    return codes[:, order.argsort()]


def inverse_root(H: torch.Tensor) -> torch.Tensor:
    """U with UᵀU = (H + damping)⁻¹, upper triangular."""
    diagonal = H.diagonal()
    diagonal += DAMPING * diagonal.mean() + torch.finfo(H.dtype).tiny
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
