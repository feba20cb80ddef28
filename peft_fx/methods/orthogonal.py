"""What the methods that rotate have in common: skew matrices, their Cayley transform, and blocks left out while training."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ..fields import checked

# Kinds whose inputs cannot be mixed (`Method.refuses`).
NO_INPUTS = {
    "norm": "{name} mixes the input features of a matrix; a norm's weight is 1-d",
    "embedding": "{name} mixes input features; those of an embedding are token ids, without a meaning in between",
}


def terms():
    """The field of a config for the terms of `neumann`."""
    return checked(5, lambda t: t >= 2, "2 or more, as 1 is no rotation")


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


def shortened(Q: torch.Tensor, longest: float) -> torch.Tensor:
    """(..., c, c), each of at most that Frobenius norm."""
    norm = torch.linalg.vector_norm(Q, dim=(-2, -1), keepdim=True)
    return torch.where(norm > longest, Q * (longest / (norm + 1e-12)), Q)


def cayley(S: torch.Tensor) -> torch.Tensor:
    """(I - S)(I + S)^-1, orthogonal for skew-symmetric S."""
    wide, eye = single(S), identity_like(single(S))
    return torch.linalg.solve(eye + wide, (eye - wide).expand_as(wide), left=False).to(S.dtype)


def neumann(S: torch.Tensor, terms: int, longest: float | None = None) -> torch.Tensor:
    """I + 2 (S + ... + S^(t - 2)) + S^(t - 1), near (I + S)(I - S)^-1; 2 terms: I + 2 S. As in PEFT, 3 terms are 4.

    longest: the norm that S is first brought down to.
    """
    S = S if longest is None else shortened(S, longest)
    R, power = torch.add(identity_like(S), S, alpha=2), S
    if terms == 2:
        return R
    for _ in range(max(terms, 4) - 3):
        power = power @ S
        R = torch.add(R, power, alpha=2)
    return R + power @ S


def without_blocks(R: torch.Tensor, p: float) -> torch.Tensor:
    """R (D, c, c): while training, each block is left out with probability p."""
    kept = F.dropout(R.new_ones((len(R), 1, 1)), p, True) > 0
    return torch.where(kept, R, identity_like(R))


def without_blocks_of_one(R: torch.Tensor, count: int) -> torch.Tensor:
    """R (N, D, c, c): while training, `count` of the blocks of one of N, both at random, are left out."""
    if not count:
        return R
    N, D = R.shape[:2]
    # 24 random bits, 0 or 2, are a random number; in evaluation all are 1
    bits = F.dropout(R.new_ones((N, D + 1, 24), dtype=torch.float32), 0.5, True)
    number = (bits * bits.new_full((24,), 0.5).cumprod(0)).sum(-1)
    one, block = number[:, :1].argsort(0).argsort(0) == 0, number[:, 1:].argsort(1).argsort(1) < count
    out = one & block & (bits[:, 1:, 0] != 1)
    return torch.where(out[..., None, None], identity_like(R), R)
