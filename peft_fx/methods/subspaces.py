"""What AdaMSS computes from a weight, and how files hold its subspaces.

Initialisers: (empty tensor, W or [W, b], *needed) -> None, in place. rows: (k, m), row i marks C_i. components: (k, R), those
that exist. A: (k, R, q), B: (m, R), zero where there is no component.
"""

from __future__ import annotations

import torch

from ..target import sizes
from .decompositions import sketched_svd


def decomposition(W, q: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """U (m, q) and V (q, n) of [W | b] in fp32, as PEFT draws them."""
    W, b = W if isinstance(W, list) else (W, None)
    W = W.flatten(1).float() if b is None else torch.cat([W.flatten(1), b.unsqueeze(1)], 1).float()
    U, _, V = sketched_svd(W, q, 2, seed)
    return U, V


def directions(q, seed, tensor, W):
    base = W[0] if isinstance(W, list) else W
    tensor.copy_(decomposition(W, q, seed)[1].to(base.dtype))


def clusters(q, seed, rows, W):
    """The clusters that PEFT finds, by scikit-learn with its fixed seed."""
    from sklearn.cluster import KMeans  # an extra: only AdaMSS needs it

    U, k = decomposition(W, q, seed)[0], len(rows)
    found = KMeans(k, init="random", n_init=1, max_iter=10, random_state=123456789).fit_predict(U.cpu().numpy())
    rows.copy_(torch.from_numpy(found) == torch.arange(k).unsqueeze(1))


def leading(seed, threshold, A, W, rows):
    """About the leading right singular vectors of each cluster's rows of U; threshold: for their number, None for all.

    As PEFT sketches them, with numbers from the global generator.
    """
    U = decomposition(W, A.shape[-1], seed)[0]
    A.zero_()
    for A_i, C_i in zip(A, rows, strict=True):
        X = U[C_i]
        Z, r = X @ X.mT, min(len(X), len(A_i))
        if threshold is not None:
            S = torch.svd_lowrank(Z, q=len(Z))[1]
            r = min(r, max(1, int(S.gt(threshold * S[:1]).sum())))
        left = torch.svd_lowrank(Z, q=r)[0]
        A_i[:r] = torch.linalg.qr(X.mT @ left).Q.mT


def existing(components, W, A):
    components.copy_((A != 0).any(-1))


def start(std, B, W, rows, components):
    B.zero_()
    if std:
        B.normal_(std=std).mul_((rows.unsqueeze(-1) & components.unsqueeze(1)).any(0))


# PEFT's pieces: A_i (r_i, q) and B_i (|C_i|, r_i)


def split_A(A, components):
    return [A_i[used] for A_i, used in zip(A, components, strict=True)]


def split_B(B, rows, components):
    return [B[C_i][:, used] for C_i, used in zip(rows, components, strict=True)]


def join_A(A, pieces, rows):
    A.zero_()
    _, R, q = A.shape
    for i, piece in enumerate(pieces):
        if not piece.is_floating_point() or piece.dim() != 2 or len(piece) > R or piece.shape[1] != q:
            return f"piece {i}: expected numbers of shape [at most {R}, {q}], got {sizes(piece.shape)}, {piece.dtype}"
        A[i, : len(piece)] = piece
    return None


def join_B(B, pieces, rows, components):
    B.zero_()
    for i, (piece, C_i, used) in enumerate(zip(pieces, rows, components, strict=True)):
        expected = int(C_i.sum()), int(used.sum())
        if not piece.is_floating_point() or tuple(piece.shape) != expected:
            return (
                f"piece {i}: expected numbers of shape {sizes(expected)}, cluster {i}'s rows of the base weight and rows of "
                f"adamss_A.{i}, got {sizes(piece.shape)}, {piece.dtype}: the file was trained on another base, or clustered "
                "by another scikit-learn"
            )
        B[C_i, : piece.shape[1]] = piece.to(B)
    return None
