"""OFT: Orthogonal Finetuning (Qiu et al. 2023, arXiv 2306.07280), as OFTv2 (Qiu et al. 2025, arXiv 2506.19847) has it.

    W' = W blockdiag(R_1 .. R_D)ᵀ                y = W (x blockdiag(R)) + b        R_i: (c, c), c D = n input features
    R  = I + 2 Q + 2 Q² + ... + Q^(t - 1)        use_cayley_neumann: t terms of (I + Q)(I - Q)^-1
    R  = (I - Q)(I + Q)^-1                       otherwise; the opposite rotation
    coft: Q is first scaled into the ball |Q| <= eps / sqrt(D); as in PEFT, the gradient passes it unchanged

Q_i is skew-symmetric, kept as its upper triangle (c (c - 1) / 2); block_share: one for all blocks. The block size (or the
number of blocks, r) moves to the nearest divisor of n, which on convolutions counts the patch, W as W.flatten(1); on
embeddings the output features are rotated. Starts as the identity. module_dropout leaves each block out with that probability.
Right where PEFT is wrong: convolutions with kernels (PEFT adds up overlapping patches), dilation, groups; module_dropout has
no effect in PEFT; the stored numbers are not overwritten by coft.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter

from ..config import LORA_ONLY, AdapterConfig
from ..fields import probability
from ..kernels.butterfly import butterfly
from .base import InputMap, OutputMap
from .blockwise import Blockwise
from .matrices import row_size
from .orthogonal import NO_INPUTS, terms


@dataclass
class OFTConfig(AdapterConfig):
    peft_type = "OFT"
    absent = LORA_ONLY
    alternatives = ("r", "oft_block_size")

    r: int = 0
    oft_block_size: int = 32
    module_dropout: float = probability(0.0)
    fan_in_fan_out: bool = False
    init_weights: bool = True
    coft: bool = False
    eps: float = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = terms()


class OFT(Blockwise, InputMap):
    name = "OFT"
    Config = OFTConfig
    refuses = NO_INPUTS
    variants = {"embedding": "OFT_OUTPUT"}
    KEY, features = "oft_R.weight", staticmethod(row_size)

    def map_input(self, x, theta, target, config):
        return butterfly(x, self.rotations(theta, target, config), 1)

    def training_weight(self, W, b, theta, target, config):
        return butterfly(W.flatten(1), self.rotations(theta, target, config).mT, 1).reshape(W.shape), b


class OFTOutput(Blockwise, OutputMap):
    """Embeddings: the looked-up vectors are rotated."""

    name = "OFT_OUTPUT"
    Config = OFTConfig
    KEY, features = "oft_embedding_R.weight", staticmethod(attrgetter("out_features"))
    training_weight = OutputMap.weight

    def map_output(self, y, theta, target, config):
        return butterfly(y, self.rotations(theta, target, config), 1)
