"""WaveFT: sparse updates in the wavelet domain (Bilican et al. 2025, arXiv 2505.12532).

    W' = W + scaling * idwt(C)        C[p] = spectrum, zero elsewhere; use_idwt=False: W' = W + scaling * C

One level: the quarter (i, j) of C goes through filter j along rows and filter i along columns (0: low, 1: high pass), as PEFT
has it. C is padded to even sides, L - 2 longer than the weight's for filters of length L, with the weight's part in the middle;
what comes out is cut to (out, in). proportional_parameters: n_frequency * targets coefficients, shared out by size.

Starts as the identity. Families: those of FILTERS; PEFT accepts 71 more names in its config and fails at the first call.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional as F

from ..errors import RecipeError
from .base import Tensor, Together
from .inits import scaled_normal, zeros
from .spectral import Spectral, SpectralConfig, size_of, too_many
from .wavelets import FILTERS


@dataclass(frozen=True)
class WaveFTConfig(SpectralConfig):
    peft_type = "WAVEFT"

    n_frequency: int = 2592
    scaling: float = 25.0
    wavelet_family: str = "db1"
    use_idwt: bool = True
    proportional_parameters: bool = False
    init_weights: bool = True

    def __post_init__(self):
        super().__post_init__()
        if self.wavelet_family not in FILTERS:
            raise RecipeError(f"wavelet_family={self.wavelet_family!r} has no filters; one of: {', '.join(FILTERS)}")


class WaveFT(Spectral):
    name = "WAVEFT"
    Config = WaveFTConfig
    spectrum = "waveft_spectrum"

    def check(self, target, config):
        # shares can only be judged together
        return None if config.proportional_parameters else super().check(target, config)

    def start(self, config):
        return zeros if config.init_weights else partial(scaled_normal, 0.01)

    def tensors(self, target, config):
        return {} if config.proportional_parameters else super().tensors(target, config)

    def spectra(self, target, config, count):
        spec = super().spectra(target, config, count)
        if config.use_idwt:
            low = FILTERS[config.wavelet_family]
            spec["filters"] = Tensor((2, 1, len(low)), partial(low_and_high, low), trainable=False)
        return spec

    def together(self, targets, config):
        if not config.proportional_parameters:
            return Together()
        budget, total, own = config.n_frequency * len(targets), sum(map(size_of, targets)), {}
        for target in targets:
            count = max(1, round(size_of(target) / total * budget))
            if reason := too_many(target, count):
                raise RecipeError(f"{target.name}: share of n_frequency={config.n_frequency}: {reason}")
            own[target.name] = self.spectra(target, config, count)
        return Together(own=own)

    def transform(self, C, theta, config):
        if not config.use_idwt:
            return C
        filters = theta["filters"].to(C.dtype)
        extra = filters.shape[-1] - 2
        (m, n), pad = C.shape[-2:], []
        for size in (n, m):
            both = extra + (size + extra) % 2
            pad += [both // 2, both - both // 2]
        quarters = F.pad(C, pad).unflatten(-1, (2, -1)).unflatten(-3, (2, -1))  # (..., i, m / 2, j, n / 2)
        C = quarters.transpose(-4, -2).flatten(-2).flatten(-3, -2)
        return inverse(inverse(C, filters).mT, filters).mT[..., :m, :n]


def inverse(C: torch.Tensor, filters: torch.Tensor) -> torch.Tensor:
    """(..., low | high) -> (..., signal): one level along the last axis."""
    halves = C.unflatten(-1, (2, -1))
    signal = F.conv_transpose1d(halves.flatten(0, -3), filters, stride=2, padding=filters.shape[-1] - 2)
    return signal.reshape(*C.shape[:-1], -1)


def low_and_high(low: tuple[float, ...], tensor, W=None):
    high = [(-1) ** i * value for i, value in enumerate(reversed(low))]
    tensor.copy_(torch.tensor([low, high], dtype=torch.float64).unsqueeze(1))
