"""PSOFT: Orthogonal Fine-Tuning with Principal Subspace Adaptation (Wu et al. 2025, arXiv 2505.11235).

    W' = W + s B (R - I) A         A: (r, n), B: (m, r), frozen: the r principal directions of W; s = psoft_alpha / r
    R  = diag(b) (I + Q)(I - Q)^-1 diag(a)            Q skew-symmetric, its upper triangle (r (r - 1) / 2) is trained
    R  = diag(b) (I + 2 Q + 2 Q² + ...) diag(a)       use_cayley_neumann; |Q| first scaled down to cayley_neumann_eps
    R  = diag(b) R diag(a)                            psoft_orth=False: a free (r, r) matrix
    W ~ U S V:  A = V, B = U S / s (psoft_init);  A = sqrt(S / s) V, B = U sqrt(S / s) (pissa_init)

so that the principal part U S V of W becomes U S R V. A and B are not in files: they are computed again from W. Starts as
the identity (Q = 0, a = b = 1). On convolutions W is W.flatten(1); those with groups are refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import init

from ..config import LORA_ONLY, AdapterConfig, check_rank
from ..errors import RecipeError
from .base import Additive, Factors, Tensor
from .inits import constant, ones, scaled_normal, zeros
from .orthogonal import cayley, identity_like, neumann, patch_size, single, skew

INITS, DECOMPOSITIONS = ("psoft_init", "pissa_init"), ("full", "lowrank")


@dataclass(frozen=True)
class PsoftConfig(AdapterConfig):
    peft_type = "PSOFT"
    absent = LORA_ONLY | {"bias"}

    r: int = 32
    psoft_alpha: int = 32
    psoft_dropout: float = 0.0
    fan_in_fan_out: bool = False
    ab_svd_init: str = "psoft_init"
    psoft_svd: str = "full"
    psoft_svd_lowrank_niter: int = 10
    random_seed: int = 0
    psoft_orth: bool = True
    psoft_mag_b: bool = True
    psoft_mag_a: bool = True
    use_cayley_neumann: bool = False
    num_cayley_neumann_terms: int = 5
    cayley_neumann_eps: float | None = None
    init_weights: bool = True

    def __post_init__(self):
        super().__post_init__()
        check_rank("r", self.r)
        if self.psoft_alpha <= 0:
            raise RecipeError(f"psoft_alpha={self.psoft_alpha}: expected 1 or more, B is divided by psoft_alpha / r")
        if self.ab_svd_init not in INITS or self.psoft_svd not in DECOMPOSITIONS:
            raise RecipeError(
                f"(ab_svd_init, psoft_svd)=({self.ab_svd_init!r}, {self.psoft_svd!r}): expected of {INITS}, {DECOMPOSITIONS}"
            )
        if not 0.0 <= self.psoft_dropout < 1.0:
            raise RecipeError(f"psoft_dropout: expected 0 <= p < 1, got {self.psoft_dropout!r}")
        if self.use_cayley_neumann and self.num_cayley_neumann_terms < 2:
            raise RecipeError(
                f"num_cayley_neumann_terms={self.num_cayley_neumann_terms}: expected 2 or more; 1 is no rotation"
            )
        if self.use_cayley_neumann and self.cayley_neumann_eps is not None and not 0.0 < self.cayley_neumann_eps < 1.0:
            raise RecipeError(f"cayley_neumann_eps={self.cayley_neumann_eps}: expected 0 < eps < 1")


class PSOFT(Additive):
    name = "PSOFT"
    Config = PsoftConfig
    refuses = {"norm": "PSOFT adapts the principal subspace of a matrix; a norm's weight is 1-d"}

    def check(self, target, config):
        if target.groups > 1:
            return f"PSOFT: a convolution with groups={target.groups} is that many matrices, without a common subspace"
        largest = min(target.out_features, patch_size(target))
        if config.r > largest:
            sizes = f"{target.out_features} x {patch_size(target)}"
            return f"r={config.r} exceeds the rank of a matrix of {sizes}; nearest valid: {largest}"
        if config.psoft_orth and config.r < 2:
            return f"r={config.r}: one direction cannot rotate; nearest valid: 2"
        return None

    def dropout(self, config):
        return config.psoft_dropout

    def tensors(self, target, config):
        experts, r = target.shape[:-2] if target.experts else (), config.r
        s = config.psoft_alpha / r
        seed = config.random_seed, config.psoft_svd_lowrank_niter
        subspace = partial(principal, r, s, config.ab_svd_init, seed if config.psoft_svd == "lowrank" else None)
        turn = zeros if config.init_weights else partial(scaled_normal, 0.1)
        free = eye if config.init_weights else partial(near_eye, 0.1)
        shape, start = ((r * (r - 1) // 2,), turn) if config.psoft_orth else ((r, r), free)
        spec = {"psoft_R": Tensor((*experts, *shape), start, "psoft_R.weight")}
        if config.psoft_mag_a:
            spec["vector_a"] = Tensor((*experts, r), ones, "psoft_R.vector_a")
        if config.psoft_mag_b:
            spec["vector_b"] = Tensor((*experts, r), ones, "psoft_R.vector_b")
        # A and Bᵀ side by side: one decomposition
        joined = (*experts, r, patch_size(target) + target.out_features)
        spec["subspace"] = Tensor(joined, subspace, trainable=False)
        spec["scaling"] = Tensor((), partial(constant, s), trainable=False)
        return spec

    def neutral(self, target, config):
        scales = {"vector_a": config.psoft_mag_a, "vector_b": config.psoft_mag_b}
        return {"psoft_R": 0.0} | {k: 1.0 for k, used in scales.items() if used} if config.psoft_orth else None

    def literals(self, target, config):
        series = config.num_cayley_neumann_terms, config.cayley_neumann_eps
        return config.psoft_orth, series if config.use_cayley_neumann else None

    def factors(self, theta, target, config):
        A, Bt = theta["subspace"].split((patch_size(target), target.out_features), -1)
        R = rotation(theta, config)
        B = Bt.mT @ (R - identity_like(R))
        return Factors(A.unflatten(-1, target.shape[1:]) if target.kernel else A, B, theta["scaling"])


def rotation(theta, config: PsoftConfig) -> torch.Tensor:
    """R, (experts?, r, r)"""
    R = theta["psoft_R"]
    if config.psoft_orth:
        Q = skew(R, config.r)
        R = shortened(Q, config) if config.use_cayley_neumann else cayley(-Q)
    if config.psoft_mag_b:
        R = theta["vector_b"].unsqueeze(-1) * R
    if config.psoft_mag_a:
        R = R * theta["vector_a"].unsqueeze(-2)
    return R


def shortened(Q: torch.Tensor, config: PsoftConfig) -> torch.Tensor:
    """The Neumann series of Q, whose norm is first brought down to cayley_neumann_eps."""
    if config.cayley_neumann_eps is not None:
        norm = torch.linalg.vector_norm(Q, dim=(-2, -1), keepdim=True)
        Q = torch.where(norm > config.cayley_neumann_eps, Q * (config.cayley_neumann_eps / (norm + 1e-12)), Q)
    return neumann(Q, config.num_cayley_neumann_terms)


def principal(r: int, s: float, how: str, lowrank: tuple[int, int] | None, tensor, W):
    """A and Bᵀ of W, next to each other. lowrank: (seed, iterations) of the randomised decomposition."""
    W = single(W).reshape(*W.shape[: tensor.dim() - 1], -1)
    if lowrank is None:
        U, S, V = torch.linalg.svd(W, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[] if W.device.type == "cpu" else [W.device], device_type=W.device.type):
            torch.manual_seed(lowrank[0])
            U, S, V = torch.svd_lowrank(W, q=r, niter=lowrank[1])
            V = V.mT
    U, S, V = U[..., :r], (S[..., :r] / s).unsqueeze(-1), V[..., :r, :]
    A, Bt = (V, S * U.mT) if how == "psoft_init" else (S.sqrt() * V, S.sqrt() * U.mT)
    tensor.copy_(torch.cat([A, Bt], -1))


def eye(tensor, W=None):
    tensor.copy_(identity_like(tensor))


def near_eye(std, tensor, W=None):
    init.normal_(tensor, std=std)
    tensor.add_(identity_like(tensor))
