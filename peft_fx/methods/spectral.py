"""What FourierFT and WaveFT share: W' = W + T(C), C sparse in a transformed domain.

    C[p] = scaling * spectrum        p: the first n_frequency of a permutation of out * in, seeded with random_loc_seed

The positions are drawn again from the seed, files hold the spectrum only. Convolutions: the weight is the matrix (out, rest).
Experts: one spectrum each, at the same positions. The update is applied beside W, whose dtype may be too coarse for it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch

from ..config import LORA_ONLY, AdapterConfig, by_pattern, pattern_field
from ..errors import RecipeError
from ..target import Target
from .base import Branch, Tensor
from .inits import constant


@dataclass(frozen=True)
class SpectralConfig(AdapterConfig):
    absent = LORA_ONLY

    n_frequency: int = 1000
    scaling: float = 150.0
    random_loc_seed: int = 777
    fan_in_fan_out: bool = False
    n_frequency_pattern: dict = pattern_field()

    def __post_init__(self):
        super().__post_init__()
        counts = {f"n_frequency_pattern[{k!r}]": v for k, v in self.n_frequency_pattern.items()}
        for what, count in {"n_frequency": self.n_frequency, **counts}.items():
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise RecipeError(f"{what}: expected a positive integer, got {count!r}; nearest valid: 1")


class Spectral(Branch):
    refuses = {"norm": "{name} transforms matrices; this weight has shape {shape}"}
    spectrum: str  # name and key of the spectrum

    def start(self, config):
        """How the spectrum starts."""
        raise NotImplementedError

    def transform(self, C: torch.Tensor, theta, config) -> torch.Tensor:
        """(..., m, n) -> (..., m, n), linear in C."""
        raise NotImplementedError

    def count(self, target, config) -> int:
        return by_pattern(config.n_frequency_pattern, target.pattern_path, config.n_frequency)

    def check(self, target, config):
        return too_many(target, self.count(target, config))

    def tensors(self, target, config):
        return self.spectra(target, config, self.count(target, config))

    def spectra(self, target, config, count: int) -> dict[str, Tensor]:
        positions = partial(first_of_permutation, config.random_loc_seed, size_of(target))
        experts = (target.experts,) if target.experts else ()
        return {
            self.spectrum: Tensor((*experts, count), self.start(config), self.spectrum),
            "positions": Tensor((count,), positions, trainable=False, dtype=torch.int64),
            "scaling": Tensor((), partial(constant, config.scaling), trainable=False),
        }

    def neutral(self, target, config):
        return {self.spectrum: 0.0}

    def update(self, theta, target, config):
        values = theta[self.spectrum] * theta["scaling"]
        values = values.to(torch.promote_types(values.dtype, torch.float32))  # transforms have no half precision
        C = values.new_zeros(*values.shape[:-1], size_of(target)).index_copy(-1, theta["positions"], values)
        return self.transform(C.unflatten(-1, (target.out_features, -1)), theta, config)

    def delta(self, x, theta, target, config):
        return x @ self.update(theta, target, config).to(x.dtype).mT

    def weight(self, W, b, theta, target, config):
        return W + self.update(theta, target, config).reshape(W.shape), b


def size_of(target: Target) -> int:
    """Elements of the weight, of one expert."""
    return math.prod(target.shape) // (target.experts or 1)


def too_many(target: Target, count: int) -> str | None:
    if count <= (size := size_of(target)):
        return None
    return f"n_frequency={count} is more than the weight's {size} elements; nearest valid: {size}"


def first_of_permutation(seed: int, size: int, tensor, W=None):
    drawn = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    tensor.copy_(drawn[: tensor.shape[0]])
