"""SHiRA: Sparse High Rank Adapters (Bhardwaj et al. 2024, arXiv 2406.13175).

    W' = W, with shira_weight[i] added at (row, column) = shira_indices[:, i]

As many numbers as LoRA of rank r would have, r (out + in), at positions that are drawn once and kept in the file: the first
entries of a random permutation from a CPU generator seeded with random_seed (None: the generator's fixed default), in row-major
order, bit for bit PEFT's. Starts as the identity. PEFT has nn.Linear; here convolutions as matrices
(out, in / groups * kernel), Conv1D and embeddings as well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

import torch

from ..config import LORA_ONLY, AdapterConfig, check_rank
from ..errors import RecipeError
from .base import Rewrite, Tensor
from .inits import normal, zeros


@dataclass(frozen=True)
class ShiraConfig(AdapterConfig):
    peft_type = "SHIRA"
    absent = LORA_ONLY | {"bias", "exclude_modules", "layers_pattern", "layers_to_transform"}

    r: int = 32
    mask_type: str = "random"
    random_seed: int | None = None
    fan_in_fan_out: bool = False
    init_weights: bool = True

    def __post_init__(self):
        super().__post_init__()
        check_rank("r", self.r)
        if self.mask_type != "random" and not self.inference_mode:  # a file has its positions, wherever they are from
            raise RecipeError(f"mask_type={self.mask_type!r}: expected 'random'")

    def with_rank(self, rank):
        return replace(self, r=rank)


class SHiRA(Rewrite):
    name = "SHIRA"
    Config = ShiraConfig

    def check(self, target, config):
        if target.experts or target.kind == "norm" or len(target.shape) < 2:
            return f"SHiRA changes entries of one matrix; this weight has shape {target.shape}"
        m, n = matrix_shape(target)
        if config.r * (m + n) > m * n:
            largest = m * n // (m + n)
            nearest = f"largest valid: {largest}" if largest else "no r is small enough"
            return f"r={config.r} asks for {config.r * (m + n)} of {m * n} entries; {nearest}"
        return None

    def tensors(self, target, config):
        m, n = matrix_shape(target)
        count = config.r * (m + n)
        return {
            "shira_weight": Tensor((count,), zeros if config.init_weights else normal, "shira_weight", pad=((0, 1),)),
            "shira_indices": Tensor(
                (2, count),
                partial(positions, m, n, config.random_seed),
                "shira_indices",
                trainable=False,
                dtype=torch.int32,
                pad=((1, 1),),
            ),
        }

    def neutral(self, target, config):
        return {"shira_weight": 0.0}

    def weight(self, W, b, theta, target, config):
        row, column = theta["shira_indices"].long()
        place = row * matrix_shape(target)[1] + column
        return W.flatten().scatter_add(0, place, theta["shira_weight"]).reshape(W.shape), b


def matrix_shape(target) -> tuple[int, int]:
    return target.out_features, math.prod(target.shape[1:])


def positions(m: int, n: int, seed: int | None, tensor, W=None):
    """Rows and columns of `tensor.shape[1]` different entries of an (m, n) matrix."""
    generator = torch.Generator()
    if seed is not None:
        generator.manual_seed(seed)
    chosen = torch.randperm(m * n, generator=generator)[: tensor.shape[1]].sort().values
    tensor.copy_(torch.stack([chosen // n, chosen % n]))
