"""What FourierFT and WaveFT share: W' = W + T C Sᵀ, C sparse, T and S fixed fast transforms of columns and rows.

    C[p] = scaling * spectrum        p: the first n_frequency of a permutation of out * in, seeded with random_loc_seed
    y' = y + T (C (Sᵀ x))            gathered: nothing of W's size is made

The positions are drawn again from the seed, files hold the spectrum only. Convolutions: the weight is the matrix (out, rest).
Experts: one spectrum each, at the same positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch

from ..checks import check_count
from ..config import LORA_ONLY, AdapterConfig, by_pattern
from ..fields import count, pattern_field
from ..target import Target
from .base import Branch, Tensor
from .draws import permuted
from .inits import scaled_normal, zeros
from .matrices import row_size
from .scales import fixed


@dataclass
class SpectralConfig(AdapterConfig):
    absent = LORA_ONLY

    n_frequency: int = count(1000)
    scaling: float = 150.0
    random_loc_seed: int = 777
    fan_in_fan_out: bool = False
    n_frequency_pattern: dict = pattern_field(check_count)


class Spectral(Branch):
    one_size = "coefficients of zero would need positions of their own"
    refuses = {"norm": "{name} transforms matrices; this weight has shape {shape}"}
    spectrum: str  # name and key of the spectrum
    std: float  # of its normal start, without init_weights
    zero = staticmethod(zeros)  # its start with init_weights

    def analysis(self, x: torch.Tensor, theta, config) -> torch.Tensor:
        """(..., n) -> (..., n'): Sᵀ x."""
        raise NotImplementedError

    def synthesis(self, c: torch.Tensor, size: int, theta, config) -> torch.Tensor:
        """(..., m') -> (..., m): T c; size: m. The same function with n is S."""
        raise NotImplementedError

    def padded(self, size: int, config) -> int:
        """How many coefficients a signal of this size has."""
        return size

    def cells(self, p: torch.Tensor, target, config) -> tuple[torch.Tensor, torch.Tensor]:
        """Row and column in C of positions in the flat weight."""
        return p // row_size(target), p % row_size(target)

    def number(self, target, config) -> int:
        return by_pattern(config.n_frequency_pattern, target.pattern_path, config.n_frequency)

    def check(self, target, config):
        return too_many(target, self.number(target, config))

    def tensors(self, target, config):
        return self.spectra(target, config, self.number(target, config))

    def spectra(self, target, config, number: int) -> dict[str, Tensor]:
        """The tensors of a target with this many coefficients."""
        start = self.zero if config.init_weights else partial(scaled_normal, self.std)
        return {
            self.spectrum: Tensor((number,), start, self.spectrum),
            "positions": Tensor(
                (2, number), partial(drawn, self, target, config), trainable=False, dtype=torch.int64, derived=True
            ),
            "scaling": fixed(config.scaling),
        }

    def delta(self, x, theta, target, config):
        values, (rows, columns) = theta[self.spectrum] * theta["scaling"], theta["positions"].unbind()
        c = self.analysis(x, theta, config).index_select(-1, columns) * values
        sums = c.new_zeros(*c.shape[:-1], self.padded(target.out_features, config)).index_add(-1, rows, c)
        return self.synthesis(sums, target.out_features, theta, config).real

    def weight(self, W, b, theta, target, config):
        values, (rows, columns) = theta[self.spectrum] * theta["scaling"], theta["positions"].unbind()
        m, n = target.out_features, row_size(target)
        height, width = self.padded(m, config), self.padded(n, config)
        C = values.new_zeros(height * width).scatter(0, rows * width + columns, values).view(height, width)
        dW = self.synthesis(self.synthesis(C, n, theta, config).mT, m, theta, config).mT
        return W + dW.real.reshape(W.shape), b


def too_many(target: Target, number: int) -> str | None:
    if number <= (size := math.prod(target.shape)):
        return None
    return f"n_frequency={number} is more than the weight's {size} elements; nearest valid: {size}"


def drawn(method: Spectral, target: Target, config, tensor, W=None):
    first = permuted(math.prod(target.shape), tensor.shape[1], config.random_loc_seed)
    tensor.copy_(torch.stack(method.cells(first, target, config)))
