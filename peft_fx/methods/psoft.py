"""PSOFT: Orthogonal Fine-Tuning with Principal Subspace Adaptation (Wu et al. 2025, arXiv 2505.11235).

    W' = W + B (R - I) A           A: (r, n), B: (m, r), frozen: the r principal directions of W ~ U S V
    R  = diag(b) (I + Q)(I - Q)^-1 diag(a)            Q skew-symmetric, its upper triangle (r (r - 1) / 2) is trained
    R  = diag(b) (I + 2 Q + 2 Q² + ...) diag(a)       use_cayley_neumann; |Q| first scaled down to cayley_neumann_eps
    R  = diag(b) R diag(a)                            psoft_orth=False: a free (r, r) matrix
    A = V, B = U S (psoft_init);  A = sqrt(S) V, B = U sqrt(S) (pissa_init)

A and B are not in files: they are computed again from W. psoft_alpha cancels: PEFT divides B by psoft_alpha / r and
multiplies the product by it. Starts as the identity (Q = 0, a = b = 1). On convolutions W is W.flatten(1), one subspace for
all groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from ..config import LORA_ONLY, AdapterConfig
from ..fields import checked, one_of, probability, rank
from .base import Tensor
from .decompositions import principal
from .inits import near, near_eye, ones
from .matrices import Matrices, row_size
from .orthogonal import cayley, identity_like, neumann, skew, terms


@dataclass
class PsoftConfig(AdapterConfig):
    peft_type = "PSOFT"
    absent = LORA_ONLY | {"bias"}

    r: int = rank(32)
    psoft_alpha: int = rank(32)
    psoft_dropout: float = probability(0.0)
    fan_in_fan_out: bool = False
    ab_svd_init: str = one_of("psoft_init", "pissa_init")
    psoft_svd: str = one_of("full", "lowrank")
    psoft_svd_lowrank_niter: int = 10
    random_seed: int = 0
    psoft_orth: bool = True
    psoft_mag_b: bool = True
    psoft_mag_a: bool = True
    use_cayley_neumann: bool = False
    num_cayley_neumann_terms: int = terms()
    cayley_neumann_eps: float | None = checked(None, lambda eps: 0.0 < eps < 1.0, "0 < eps < 1")
    init_weights: bool = True


class PSOFT(Matrices):
    name = "PSOFT"
    Config = PsoftConfig
    one_size = "the angles of a rotation are numbered by r"
    refuses = {"norm": "PSOFT adapts the principal subspace of a matrix; a norm's weight is 1-d"}
    drops = "psoft_dropout"
    off = {"psoft_R": 0.0, "vector_a": 1.0, "vector_b": 1.0}

    def check(self, target, config):
        m, n = target.out_features, row_size(target)
        if config.r > min(m, n):
            return f"r={config.r} exceeds the rank of a matrix of {m} x {n}; nearest valid: {min(m, n)}"
        if config.psoft_orth and config.r < 2:
            return f"r={config.r}: one direction cannot rotate; nearest valid: 2"
        return None

    def tensors(self, target, config):
        r, columns = config.r, row_size(target) + target.out_features
        shape, start = ((r * (r - 1) // 2,), near(0.0, config)) if config.psoft_orth else ((r, r), near_eye(config))
        vectors = [f"vector_{side}" for side in "ab" if getattr(config, f"psoft_mag_{side}")]
        return {
            "psoft_R": Tensor(shape, start, "psoft_R.weight"),
            **{name: Tensor((r,), ones, f"psoft_R.{name}") for name in vectors},
            "subspace": Tensor((r, columns), partial(principal, config), trainable=False),
        }

    def neutral(self, target, config):
        return self.off if config.psoft_orth else None

    def literals(self, target, config):
        series = config.num_cayley_neumann_terms, config.cayley_neumann_eps
        return config.psoft_orth, series if config.use_cayley_neumann else None

    def matrices(self, theta, target, config):
        A, Bt = theta["subspace"].split((row_size(target), target.out_features), -1)
        R = theta["psoft_R"]
        if config.psoft_orth:
            Q, series = skew(R, config.r), (config.num_cayley_neumann_terms, config.cayley_neumann_eps)
            R = neumann(Q, *series) if config.use_cayley_neumann else cayley(-Q)
        R = theta["vector_b"].unsqueeze(-1) * R if config.psoft_mag_b else R
        R = R * theta["vector_a"] if config.psoft_mag_a else R
        return A, Bt.mT @ (R - identity_like(R))
