"""WaveFT: sparse updates in the wavelet domain (Bilican et al. 2025, arXiv 2505.12532).

    W' = W + scaling * idwt(C)        C[p] = spectrum, zero elsewhere; use_idwt=False: W' = W + scaling * C

One level: the quarter (i, j) of C goes through filter j along rows and filter i along columns (0: low, 1: high pass), as PEFT
has it. C is padded to even sides, L - 2 longer than the weight's for filters of length L, with the weight's part in the middle;
what comes out is cut to (out, in). proportional_parameters: n_frequency * targets coefficients, shared out by size. Starts as
the identity. Families: those of FILTERS; PEFT accepts 71 more names in its config and fails at the first call.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

from ..errors import RecipeError
from ..fields import count, one_of
from .base import Tensor, Together
from .matrices import row_size
from .spectral import Spectral, SpectralConfig, too_many
from .wavelets import FILTERS, dwt, idwt, low_and_high


@dataclass
class WaveFTConfig(SpectralConfig):
    peft_type = "WAVEFT"

    n_frequency: int = count(2592)
    scaling: float = 25.0
    wavelet_family: str = one_of(*FILTERS)
    use_idwt: bool = True
    proportional_parameters: bool = False
    init_weights: bool = True


class WaveFT(Spectral):
    name = "WAVEFT"
    Config = WaveFTConfig
    spectrum = "waveft_spectrum"
    std = 0.01
    off = {"waveft_spectrum": 0.0}

    def check(self, target, config):  # shares can only be judged together
        return None if config.proportional_parameters else super().check(target, config)

    def tensors(self, target, config):
        return {} if config.proportional_parameters else super().tensors(target, config)

    def spectra(self, target, config, number):
        shape, start = (2, 1, len(FILTERS[config.wavelet_family])), partial(low_and_high, config.wavelet_family)
        filters = {"filters": Tensor(shape, start, trainable=False, derived=True)} if config.use_idwt else {}
        return super().spectra(target, config, number) | filters

    def together(self, targets, config):
        total, own = sum(math.prod(t.shape) for t in targets), {}
        for target in targets if config.proportional_parameters else ():
            share = max(1, round(math.prod(target.shape) / total * (config.n_frequency * len(targets))))
            if reason := too_many(target, share):
                raise RecipeError(f"{target.name}: share of n_frequency={config.n_frequency}: {reason}")
            own[target.name] = self.spectra(target, config, share)
        return Together(own=own)

    def padded(self, size, config):
        longer = size + len(FILTERS[config.wavelet_family]) - 2
        return longer + longer % 2 if config.use_idwt else size

    def cells(self, p, target, config):
        m, n = target.out_features, row_size(target)
        height, width = self.padded(m, config), self.padded(n, config)
        rows, columns = p // n + (height - m) // 2, p % n + (width - n) // 2
        if not config.use_idwt:
            return rows, columns
        i, j = rows * 2 // height, columns * 2 // width  # the quarter (i, j) is low or high pass along the other axis
        return rows + (j - i) * (height // 2), columns + (i - j) * (width // 2)

    def analysis(self, x, theta, config):
        return dwt(x, theta["filters"].to(x.dtype)) if config.use_idwt else x

    def synthesis(self, c, size, theta, config):
        return idwt(c, size, theta["filters"].to(c.dtype)) if config.use_idwt else c
