"""`Blockwise`: the shape of methods that rotate features in blocks, those of the input or those of the output.

blockdiag(R_1 .. R_D)        R_i: (c, c), c D = n features; Q_i skew-symmetric, kept as its upper triangle
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from ..target import Target
from .base import Method, Tensor
from .inits import near
from .orthogonal import cayley, neumann, shortened, skew, without_blocks
from .shapes import nearest_divisor


class Blockwise(Method):
    """features: how many there are to rotate. KEY: suffix of the key in the file. The config is OFT's."""

    off = {"oft_R": 0.0}
    one_size = "the size of the blocks says which features are rotated together"
    KEY: str
    features: Callable[[Target], int]

    def blocks(self, target, config) -> tuple[int, int]:
        """Number and size of the blocks: D, c."""
        n = self.features(target)
        D = nearest_divisor(config.r, n) if config.r else n // nearest_divisor(config.oft_block_size, n)
        return D, n // D

    def check(self, target, config):
        n, c = self.blocks(target, config)
        if c > 1:
            return None
        valid = ", ".join(str(d) for d in range(2, n + 1) if n % d == 0)
        return f"blocks of one feature cannot rotate: {n} features allow oft_block_size {valid or 'none'}"

    def advice(self, target, config):
        given = "r" if config.r else "oft_block_size"
        n, c = self.blocks(target, config)
        used = n if config.r else c
        if used == getattr(config, given):
            return None
        return f"{given}={getattr(config, given)} does not divide {self.features(target)} features: {used} is used"

    def tensors(self, target, config):
        D, c = self.blocks(target, config)
        shape = (1 if config.block_share else D, c * (c - 1) // 2)
        return {"oft_R": Tensor(shape, near(0.0, config), self.KEY)}

    def literals(self, target, config):
        series = config.num_cayley_neumann_terms if config.use_cayley_neumann else None
        return config.coft and config.eps, series, config.module_dropout

    def rotations(self, theta, target, config) -> torch.Tensor:
        """(D, c, c)"""
        D, c = self.blocks(target, config)
        Q = skew(theta["oft_R"], c)
        if config.coft:
            Q = Q + (shortened(Q, config.eps / len(Q) ** 0.5) - Q).detach()
        R = neumann(Q, config.num_cayley_neumann_terms) if config.use_cayley_neumann else cayley(Q)
        R = R.expand(D, c, c)
        return without_blocks(R, config.module_dropout) if config.module_dropout else R

    def weight(self, W, b, theta, target, config):
        return self.training_weight(W, b, theta, target, replace(config, module_dropout=0.0))
