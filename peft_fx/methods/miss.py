"""MiSS: Matrix Shard Sharing, first called Bone (Kang 2024, arXiv 2409.15371).

    W'[o, j] = W[o, j] + M[j mod r, o]                      M: (r, m), n need not be divisible by r
    y        = W x + Mᵀ (sum of the r-wide shards of x)
    mini:  M = [D, D, ..., D]                               D: (r, mini_r), mini_r divides m
    bat:   another method, miss_bat.py

On convolutions W is the matrix (m, patch). Starts as the identity except with init_weights=False. With PEFT the first adapter
fixes a layer's mode and one with another mode fails; here each has its own. BONE files are MiSS files under other names: read,
never written.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch.nn import functional as F

from ..config import LORA_ONLY, AdapterConfig
from ..fields import one_of, probability, rank
from . import get_method
from .base import Branch, Tensor
from .inits import kaiming, zeros
from .matrices import row_size
from .shapes import indivisible


@dataclass
class MissConfig(AdapterConfig):
    peft_type = "MISS"
    absent = LORA_ONLY

    r: int = rank(64)
    mini_r: int = rank(1)
    miss_dropout: float = probability()
    init_weights: bool | str = one_of(True, False, "bat", "mini")


class MiSS(Branch):
    name = "MISS"
    Config = MissConfig
    one_size = "r says which input features share a row"
    refuses = {"norm": "MiSS shares shards of a matrix's columns; a norm's weight has none"}
    drops = "miss_dropout"
    off = {"miss_block": 0.0}

    def at(self, target, config):
        return get_method("MISS_BAT") if config.init_weights == "bat" else self

    def check(self, target, config):
        n, m = row_size(target), target.out_features
        if config.r > n:
            return f"r={config.r} is larger than the input features, {n}; nearest valid: {n}"
        if config.init_weights == "mini":
            return indivisible("mini_r", config.mini_r, m, f"{m} output features")
        return None

    def tensors(self, target, config):
        width = config.mini_r if config.init_weights == "mini" else target.out_features
        return {"miss_block": Tensor((config.r, width), zeros if config.init_weights else kaiming, "miss_block")}

    def delta(self, x, theta, target, config):
        shards = F.pad(x, (0, -x.shape[-1] % config.r)).unflatten(-1, (-1, config.r))
        return shards.sum(-2) @ block(theta, target)

    def weight(self, W, b, theta, target, config):
        n = row_size(target)
        return W + block(theta, target).mT.repeat(1, math.ceil(n / config.r))[:, :n].reshape(W.shape), b


def block(theta, target):
    """M: (r, m), whether or not its columns repeat."""
    M = theta["miss_block"]
    return M.repeat(1, target.out_features // M.shape[1])
