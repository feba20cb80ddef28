"""FourierFT: discrete Fourier transform of a sparse spectrum (Gao et al. 2024, arXiv 2405.03003).

    W' = W + scaling * Re(ifft2(C))        C[p] = spectrum, zero elsewhere; ifft2 carries 1 / (out * in)
    y' = y + scaling * Re(ifft(C ifft(x)))

Not the identity at the start: as in PEFT the spectrum is normal, unless init_weights is set. n_frequency_pattern also matches
modules at the top of the model, which PEFT passes over. PEFT has linear weights only.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from .base import HALF
from .inits import drawn_over, normal, zeros
from .spectral import Spectral, SpectralConfig


@dataclass
class FourierFTConfig(SpectralConfig):
    peft_type = "FOURIERFT"

    init_weights: bool = False


class FourierFT(Spectral):
    name = "FOURIERFT"
    Config = FourierFTConfig
    spectrum = "fourierft_spectrum"
    std = 1.0
    zero = staticmethod(partial(drawn_over, normal, zeros))
    off = {"fourierft_spectrum": 0.0}

    def analysis(self, x, theta, config):
        return transform(x)

    def synthesis(self, c, size, theta, config):
        return transform(c)


def transform(x):
    """The inverse FFT, in fp32 at least: torch has none in bf16, and in fp16 none on CPUs."""
    return torch.fft.ifft(x.float() if x.dtype in HALF else x)
