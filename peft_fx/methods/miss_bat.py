"""MiSS with init_weights="bat" (Kang 2024, arXiv 2409.15371): blocks of the weight are rewritten.

    W'[o, i] = W[o, i] + W[o, i] B[o] + B[o]         r x r blocks of W; B: (m / r, r, r), r divides n and m

On convolutions W is the matrix (m, patch). Starts as the identity. As in PEFT, miss_dropout has no effect.
"""

from __future__ import annotations

import math

from .base import Rewrite, Tensor
from .inits import zeros
from .matrices import row_size
from .miss import MiSS, MissConfig
from .shapes import indivisible


class MissBat(Rewrite):
    name = "MISS_BAT"
    Config = MissConfig
    refuses = MiSS.refuses
    off = {"miss_block": 0.0}

    def check(self, target, config):
        n, m = row_size(target), target.out_features
        return indivisible("r", config.r, math.gcd(n, m), f"both {n} and {m}")

    def tensors(self, target, config):
        return {"miss_block": Tensor((target.out_features // config.r, config.r, config.r), zeros, "miss_block")}

    def weight(self, W, b, theta, target, config):
        B = theta["miss_block"]
        # (column block, row block, r, r)
        blocks = W.flatten(1).unflatten(1, (-1, config.r)).unflatten(0, (-1, config.r)).movedim(2, 0)
        blocks = blocks + (blocks @ B + B)
        return blocks.movedim(0, 2).reshape(W.shape), b
