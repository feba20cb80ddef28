"""FourierFT: discrete Fourier transform of a sparse spectrum (Gao et al. 2024, arXiv 2405.03003).

    W' = W + scaling * Re(ifft2(C))        C[p] = spectrum, zero elsewhere; ifft2 carries 1 / (out * in)

Not the identity at the start: as in PEFT the spectrum is normal, unless init_weights is set. n_frequency_pattern also matches
modules at the top of the model, which PEFT passes over. PEFT has linear weights only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .inits import normal, zeros
from .spectral import Spectral, SpectralConfig


@dataclass(frozen=True)
class FourierFTConfig(SpectralConfig):
    peft_type = "FOURIERFT"

    init_weights: bool = False


class FourierFT(Spectral):
    name = "FOURIERFT"
    Config = FourierFTConfig
    spectrum = "fourierft_spectrum"

    def start(self, config):
        return zeros if config.init_weights else normal

    def transform(self, C, theta, config):
        return torch.fft.ifft2(C).real
