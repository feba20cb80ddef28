"""Uni-LoRA (Li et al. 2025, arXiv 2506.00799): one trained vector, dealt out to all factors.

    W' = W + B A,   A = theta[i_A] s_A,  B = theta[i_B] s_B        theta: (d,), shared; i, s: the shapes of A (r, n), B (out, r)

The positions are a shuffled list in which every entry of theta occurs equally often, give or take one, numpy's generator
seeded with proj_seed; targets take theirs in turn, A first. s = 1 / sqrt(occurrences of that entry). Files hold positions
and scales only with save_indices. Not the identity at the start: theta is uniform in +-init_theta_d_bound.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch

from ..config import LORA_ONLY, AdapterConfig, check_rank
from ..errors import RecipeError
from .base import Tensor, Together
from .inits import normal, uniform
from .matrices import Matrices, row_size


@dataclass(frozen=True)
class UniLoraConfig(AdapterConfig):
    peft_type = "UNILORA"
    absent = LORA_ONLY | {"exclude_modules"}

    r: int = 4
    proj_seed: int = 42
    theta_d_length: int = 256
    init_theta_d_bound: float = 0.02
    unilora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    save_indices: bool = False
    init_weights: bool = True

    def __post_init__(self):
        super().__post_init__()
        check_rank("r", self.r)
        if self.theta_d_length <= 0 or self.init_theta_d_bound <= 0:
            raise RecipeError(
                f"theta_d_length={self.theta_d_length!r}, init_theta_d_bound={self.init_theta_d_bound!r}: "
                "both must be positive"
            )

    def with_rank(self, rank):
        return replace(self, r=rank)


class UniLoRA(Matrices):
    name = "UNILORA"
    Config = UniLoraConfig

    def dropout(self, config):
        return config.unilora_dropout

    def tensors(self, target, config):
        return {}

    def together(self, targets, config):
        shapes = [(t.name, "AB"[i], (config.r, row_size(t)) if i == 0 else (t.out_features, config.r))
                  for t in targets for i in (0, 1)]  # fmt: skip
        deal = (sum(m * n for _, _, (m, n) in shapes), config.theta_d_length, config.proj_seed)
        own, first = {t.name: {} for t in targets}, 0
        for name, factor, shape in shapes:
            for what, start, dtype in ("indices", positions, torch.int64), ("scales", scales, None):
                key = f"unilora_{what}_{factor}"
                own[name][key] = Tensor(
                    shape, partial(start, deal, first), key if config.save_indices else None, False, dtype
                )
            first += shape[0] * shape[1]
        start = partial(uniform, config.init_theta_d_bound) if config.init_weights else normal
        return Together({"unilora_theta_d": Tensor((config.theta_d_length,), start, "unilora_theta_d")}, own)

    def matrices(self, theta, target, config):
        values = theta["unilora_theta_d"]
        return tuple(values[theta[f"unilora_indices_{f}"]] * theta[f"unilora_scales_{f}"] for f in "AB")


@lru_cache(maxsize=1)
def dealt(numbers: int, entries: int, seed: int) -> torch.Tensor:
    """(numbers,) positions in a vector of `entries`, as PEFT deals them."""
    import numpy as np  # its generator defines the positions

    generator = np.random.default_rng(seed)
    data = np.repeat(np.arange(entries), numbers // entries)
    if rest := numbers % entries:
        data = np.concatenate([data, generator.choice(entries, size=rest, replace=False)])
    generator.shuffle(data)
    return torch.as_tensor(data, dtype=torch.int64)


def positions(deal: tuple[int, int, int], first: int, tensor, W=None):
    tensor.copy_(dealt(*deal)[first : first + tensor.numel()].reshape(tensor.shape))


def scales(deal: tuple[int, int, int], first: int, tensor, W):
    all_positions = dealt(*deal)
    occurrences = torch.bincount(all_positions, minlength=deal[1])
    chosen = occurrences[all_positions[first : first + tensor.numel()]].to(torch.float32).rsqrt()
    tensor.copy_(chosen.reshape(tensor.shape).to(W.dtype))  # rounded through the base's dtype, as PEFT does
