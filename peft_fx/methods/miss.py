"""MiSS: Matrix Shard Sharing, first called Bone (Kang 2024, arXiv 2409.15371).

    W'[o, j] = W[o, j] + M[j mod r, o]                      M: (r, m), n need not be divisible by r
    y        = W x + Mᵀ (sum of the r-wide shards of x)
    mini:  M = [D, D, ..., D]                               D: (r, mini_r), mini_r divides m
    bat:   W'[o, i] = W[o, i] + W[o, i] B[o] + B[o]         r x r blocks of W; B: (m / r, r, r), r divides n and m

On convolutions W is flattened to (m, patch). Starts as the identity except with init_weights=False. PEFT fixes the mode per
layer by the first adapter, so that a second one with another mode fails; here each adapter has its own. As in PEFT,
miss_dropout has no effect with "bat". BONE files are MiSS files under other names: read, never written.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch.nn import functional as F

from ..config import LORA_ONLY, AdapterConfig, check_rank
from ..errors import RecipeError
from .base import Branch, Rewrite, Tensor
from .inits import kaiming, zeros
from .shapes import as_matrix, columns, experts, nearest_divisor, per_expert

MODES = (True, False, "bat", "mini")


@dataclass(frozen=True)
class MissConfig(AdapterConfig):
    peft_type = "MISS"
    absent = LORA_ONLY

    r: int = 64
    mini_r: int = 1
    miss_dropout: float = 0.0
    init_weights: bool | str = True

    def __post_init__(self):
        super().__post_init__()
        check_rank("r", self.r)
        check_rank("mini_r", self.mini_r)
        if not 0.0 <= self.miss_dropout < 1.0:
            raise RecipeError(f"miss_dropout: expected 0 <= p < 1, got {self.miss_dropout!r}")
        if self.init_weights not in MODES:
            raise RecipeError(f"init_weights={self.init_weights!r}: expected one of {MODES}")


class MiSS(Branch):
    name = "MISS"
    Config = MissConfig
    refuses = {"norm": "MiSS shares shards of a matrix's columns; a norm's weight has none"}

    def at(self, target, config):
        return MissBat() if config.init_weights == "bat" else self

    def check(self, target, config):
        n, m = columns(target), target.out_features
        if config.r > n:
            return f"r={config.r} is larger than the input features, {n}; nearest valid: {n}"
        if config.init_weights == "mini" and m % config.mini_r:
            nearest = nearest_divisor(config.mini_r, m)
            return f"mini_r={config.mini_r} does not divide the output features, {m}; nearest valid: {nearest}"
        return None

    def dropout(self, config):
        return config.miss_dropout

    def tensors(self, target, config):
        width = config.mini_r if config.init_weights == "mini" else target.out_features
        start = zeros if config.init_weights else per_expert(kaiming, target)
        return {"miss_block": Tensor((*experts(target), config.r, width), start, "miss_block")}

    def neutral(self, target, config):
        return {"miss_block": 0.0}

    def delta(self, x, theta, target, config):
        shards = F.pad(x, (0, -x.shape[-1] % config.r)).unflatten(-1, (-1, config.r))
        return shards.sum(-2) @ self.block(theta, target)

    def weight(self, W, b, theta, target, config):
        flat = as_matrix(W, target)
        shards = math.ceil(flat.shape[-1] / config.r)
        dW = self.block(theta, target).mT
        dW = dW.repeat(*(1,) * (dW.dim() - 1), shards)[..., : flat.shape[-1]]
        return (flat + dW).reshape(W.shape), b

    def block(self, theta, target):
        """M: (r, m), whether or not its columns repeat."""
        M = theta["miss_block"]
        return M.repeat(*(1,) * (M.dim() - 1), target.out_features // M.shape[-1])


class MissBat(Rewrite):
    name = "MISS_BAT"
    Config = MissConfig
    refuses = MiSS.refuses

    def check(self, target, config):
        if reason := MiSS().check(target, config):
            return reason
        n, m = columns(target), target.out_features
        if n % config.r or m % config.r:
            nearest = nearest_divisor(config.r, math.gcd(n, m))
            return f"r={config.r} does not divide both {n} and {m}; nearest valid: {nearest}"
        return None

    def tensors(self, target, config):
        shape = (*experts(target), target.out_features // config.r, config.r, config.r)
        return {"miss_block": Tensor(shape, zeros, "miss_block")}

    def neutral(self, target, config):
        return {"miss_block": 0.0}

    def weight(self, W, b, theta, target, config):
        flat = as_matrix(W, target)
        B = theta["miss_block"].unsqueeze(-4)
        # (..., column block, row block, r, r)
        blocks = flat.unflatten(-1, (-1, config.r)).unflatten(-3, (-1, config.r)).movedim(-2, -4)
        blocks = blocks + (blocks @ B + B)
        return blocks.movedim(-4, -2).reshape(W.shape), b
