"""SHiRA: Sparse High Rank Adapters (Bhardwaj et al. 2024, arXiv 2406.13175).

    W' = W, with shira_weight[i] added at (row, column) = shira_indices[:, i]
    y  = W x, with shira_weight[i] x[column] added at row

As many numbers as LoRA of rank r would have, r (out + in), at positions that are drawn once and kept in the file: the first
entries of a random permutation from a CPU generator seeded with random_seed (None: the generator's fixed default), in row-major
order, bit for bit PEFT's. Starts as the identity. PEFT has nn.Linear; here convolutions as matrices
(out, in / groups * kernel), Conv1D, embeddings and experts as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from ..config import LORA_ONLY, AdapterConfig
from ..errors import RecipeError
from ..fields import rank
from .base import Tensor
from .draws import permuted
from .entries import Entries
from .inits import normal, ones, zeros
from .matrices import row_size


@dataclass
class ShiraConfig(AdapterConfig):
    peft_type = "SHIRA"
    absent = LORA_ONLY | {"bias", "exclude_modules", "layers_pattern", "layers_to_transform"}
    ranked = "r"

    r: int = rank(32)
    mask_type: str = "random"
    random_seed: int | None = None
    fan_in_fan_out: bool = False
    init_weights: bool = True

    def __post_init__(self):
        super().__post_init__()
        if self.mask_type != "random" and not self.inference_mode:  # a file has its positions, wherever they are from
            raise RecipeError(f"mask_type={self.mask_type!r}: expected 'random'")


class SHiRA(Entries):
    name = "SHIRA"
    Config = ShiraConfig
    off = {"shira_weight": 0.0}
    values = "shira_weight"

    def check(self, target, config):
        m, n = target.out_features, row_size(target)
        if config.r * (m + n) <= m * n:
            return None
        largest = m * n // (m + n)
        nearest = f"largest valid: {largest}" if largest else "no r is small enough"
        return f"r={config.r} asks for {config.r * (m + n)} of {m * n} entries; {nearest}"

    def tensors(self, target, config):
        m, n = target.out_features, row_size(target)
        k, drawn = config.r * (m + n), partial(positions, m, n, config.random_seed)
        start, name = zeros if config.init_weights else normal, "shira_indices"
        return {
            "shira_weight": Tensor((k,), start, "shira_weight", pad=((0, 1),)),
            "given": Tensor((k,), ones, trainable=False, pad=((0, 1),), derived=True),  # what is padded does not learn
            name: Tensor((2, k), drawn, name, False, torch.int32, pad=((1, 1),), below=((m,), (n,))),
        }

    def numbers(self, theta):
        return theta["shira_weight"] * theta["given"]

    def cells(self, theta, target):
        return theta["shira_indices"].long().unbind()


def positions(m: int, n: int, seed: int | None, tensor, W=None):
    chosen = permuted(m * n, tensor.shape[1], seed).sort().values
    tensor.copy_(torch.stack([chosen // n, chosen % n]))
