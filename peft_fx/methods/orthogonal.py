"""What the methods that rotate have in common: skew matrices, their Cayley transform, block rotations, and the axes."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F


def patch_size(target) -> int:
    """Numbers that one output feature reads: the input features, or a convolution's patch."""
    return math.prod(target.shape[-1 - len(target.kernel) :] if target.kernel else target.shape[-1:])


# Kinds whose inputs cannot be mixed (`Method.refuses`).
NO_INPUTS = {
    "norm": "{name} mixes the input features of a matrix; a norm's weight is 1-d",
    "embedding": "{name} mixes input features; those of an embedding are token ids, without a meaning in between",
}


def nearest_divisor(n: int, wanted: int) -> int:
    """The divisor of n that is nearest to `wanted`, the smaller one of two that are equally near."""
    return min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: (abs(d - wanted), d))


def single(tensor: torch.Tensor) -> torch.Tensor:
    """At least fp32, which solvers need."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def skew(v: torch.Tensor, c: int) -> torch.Tensor:
    """(..., c (c - 1) / 2) -> (..., c, c) skew-symmetric; v: the part above the diagonal, row by row."""
    above = v.new_ones((c, c), dtype=torch.int64).triu(1).flatten()
    position = above.cumsum(0) * above  # 0: not above the diagonal
    upper = F.pad(v, (1, 0)).index_select(-1, position).unflatten(-1, (c, c))
    return upper - upper.mT


def identity_like(S: torch.Tensor) -> torch.Tensor:
    """(c, c) identity in the dtype and on the device of (..., c, c)."""
    return torch.diag_embed(S.new_ones(S.shape[-1]))


def cayley(S: torch.Tensor) -> torch.Tensor:
    """(I - S)(I + S)^-1, orthogonal for skew-symmetric S."""
    wide, eye = single(S), identity_like(single(S))
    return torch.linalg.solve(eye + wide, (eye - wide).expand_as(wide), left=False).to(S.dtype)


def neumann(S: torch.Tensor, terms: int) -> torch.Tensor:
    """I + 2 (S + ... + S^(t - 2)) + S^(t - 1), near (I + S)(I - S)^-1; 2 terms: I + 2 S. As in PEFT, 3 terms are 4."""
    R, power = identity_like(S) + 2 * S, S
    if terms == 2:
        return R
    for _ in range(max(terms, 4) - 3):
        power = power @ S
        R = R + 2 * power
    return R + power @ S


def rotate_blocks(x: torch.Tensor, R: torch.Tensor) -> torch.Tensor:
    """x blockdiag(R): x (..., D c), R (D, c, c), or (E, D, c, c) for x (E, k, D c) or (k, D c)."""
    R = R.unsqueeze(-4) if R.dim() > 3 else R
    return torch.einsum("...dk,...dkc->...dc", x.unflatten(-1, R.shape[-3:-1]), R).flatten(-2)
