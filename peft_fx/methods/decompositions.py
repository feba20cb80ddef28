"""Singular value decompositions of base weights, seen as matrices (m, n), and the tensors that start as parts of them."""

from __future__ import annotations

import torch

from .orthogonal import single


def svd(W: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U (m, k), S (k,), V (k, n), k = min(m, n), in at least fp32."""
    return torch.linalg.svd(single(W.flatten(1)), full_matrices=False)


def sketched_svd(W: torch.Tensor, q: int, niter: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """About the q largest of them, by torch.svd_lowrank as PEFT seeds it."""
    with torch.random.fork_rng(devices=[] if W.device.type == "cpu" else [W.device], device_type=W.device.type):
        torch.manual_seed(seed)
        U, S, V = torch.svd_lowrank(W, q=q, niter=niter)
    return U, S, V.mT


# OSF: the whole decomposition is one tensor, rows of U, S and Vᵀ


def decompose(tensor, W):
    """Rounded through W's dtype, as PEFT does."""
    U, S, V = svd(W)
    tensor.copy_(torch.cat([U, S.unsqueeze(0), V.mT]).to(W.dtype))


def split_at(k: int, decomposed: torch.Tensor, m: int):
    """(U, S, V) of the k largest singular values, and of the others."""
    U, S, Vt = decomposed[:m], decomposed[m], decomposed[m + 1 :]
    return (U[:, :k], S[:k], Vt[:, :k].mT), (U[:, k:], S[k:], Vt[:, k:].mT)


def smallest(k: int, m: int, factor: int, tensor, W, decomposed):
    """U (0), S (1) or V (2) behind the k largest singular values."""
    tensor.copy_(split_at(k, decomposed, m)[1][factor])


# PSOFT: A and Bᵀ side by side are one tensor


def principal(config, tensor, W):
    """The config's principal subspace of W."""
    r = config.r
    if config.psoft_svd == "full":
        U, S, V = svd(W)
    else:
        U, S, V = sketched_svd(single(W.flatten(1)), r, config.psoft_svd_lowrank_niter, config.random_seed)
    U, S, V = U[:, :r], S[:r].unsqueeze(-1), V[:r]
    A, Bt = (V, S * U.mT) if config.ab_svd_init == "psoft_init" else (S.sqrt() * V, S.sqrt() * U.mT)
    tensor.copy_(torch.cat([A, Bt], -1))


# TinyLoRA: A is sqrt(S) V and B is U sqrt(S) of the largest singular values, of Wᵀ where `swap`


def right_singular(swap: bool, A, W):
    _, S, V = svd(W.mT if swap else W)
    A.copy_(S[: len(A), None].sqrt() * V[: len(A)])


def left_singular(swap: bool, B, W, A):
    """U sqrt(S) = W Aᵀ / S, and S is the squared length of A's rows."""
    W = W.mT if swap else W.flatten(1)
    S = A.square().sum(1)
    B.copy_(torch.where(S > 0, W.to(A.dtype) @ A.mT / S, 0.0))
