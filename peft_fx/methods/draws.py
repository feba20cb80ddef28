"""Frozen numbers drawn from seeded generators, number by number PEFT's, so that files need not hold them.

The initialisers among them are for `partial`: (..., empty tensor, base weight, *needed) -> None, in place. What PEFT draws in the
base's dtype is rounded through it.
"""

from __future__ import annotations

import math
from functools import lru_cache, partial

import torch
from torch.nn import init

from .base import Tensor, Together
from .matrices import row_size


def permuted(size: int, count: int, seed: int | None) -> torch.Tensor:
    """The first `count` of a random permutation of `size` numbers; a seed of None is torch's default."""
    generator = torch.Generator() if seed is None else torch.Generator().manual_seed(seed)
    return torch.randperm(size, generator=generator)[:count]


def seeded_normal(seed: int, std: float, tensor, W):
    tensor.copy_(torch.normal(0.0, std, tensor.shape, generator=torch.Generator().manual_seed(seed)).to(W.dtype))


# A and B, frozen and shared by all targets, from one generator. draw: (generator, shape of A, shape of B) -> both.


def largest(targets) -> tuple[int, int]:
    """The largest numbers of rows and of columns."""
    return max((t.out_features for t in targets), default=0), max(map(row_size, targets), default=0)


def projections(prefix: str, draw, A: tuple, B: tuple, config, pads: tuple = ((), ())) -> Together:
    drawn = partial(one_of_two, draw, config.projection_prng_key, A, B)
    filed = config.save_projection
    return Together({
        name: Tensor(shape, partial(drawn, i), name if filed else None, trainable=False, pad=pads[i], derived=not filed)
        for i, (name, shape) in enumerate({f"{prefix}_A": A, f"{prefix}_B": B}.items())
    })  # fmt: skip


def one_of_two(draw, seed: int, A: tuple, B: tuple, which: int, tensor, W):
    tensor.copy_(draw(torch.Generator().manual_seed(seed), A, B)[which].to(W.dtype))


def kaiming_pair(generator, A: tuple, B: tuple) -> list[torch.Tensor]:
    """Uniform in +-sqrt(6 / fan_in)."""
    return [init.kaiming_uniform_(torch.empty(shape), generator=generator) for shape in (A, B)]


def dense_bases(generator, A: tuple, B: tuple) -> list[torch.Tensor]:
    """Of standard deviation 1: uniform, in bfloat16, B base by base along its second axis."""
    drawn = [torch.empty(shape, dtype=torch.bfloat16) for shape in (A, *[(B[0], 1, B[2])] * B[1])]
    for base in drawn:
        init.kaiming_uniform_(base, a=math.sqrt(5), generator=generator)
    return [base / base.std() for base in (drawn[0], torch.cat(drawn[1:], dim=1))]


def sparse_bases(sparsity: float, generator, A: tuple, B: tuple) -> list[torch.Tensor]:
    """Of standard deviation 1: -1 and 1, each with probability 1 / (2 sparsity), and 0."""
    edge, drawn = 1 / (2 * sparsity), [torch.rand(shape, generator=generator) for shape in (A, B)]
    signs = [(u > 1 - edge).float() - (u < edge).float() for u in drawn]
    return [base / base.std() for base in signs]


# Positions in a vector, all of which occur equally often, give or take one. deal: (how many, length of the vector, seed).


@lru_cache(maxsize=1)
def dealt(numbers: int, entries: int, seed: int) -> torch.Tensor:
    import numpy as np  # its generator defines the positions

    generator = np.random.default_rng(seed)
    data = np.repeat(np.arange(entries), numbers // entries)
    if rest := numbers % entries:
        data = np.concatenate([data, generator.choice(entries, size=rest, replace=False)])
    generator.shuffle(data)
    return torch.as_tensor(data, dtype=torch.int64)


def dealt_positions(deal: tuple[int, int, int], first: int, tensor, W=None):
    tensor.copy_(dealt(*deal)[first : first + tensor.numel()].reshape(tensor.shape))


def dealt_scales(deal: tuple[int, int, int], first: int, tensor, W):
    """1 / sqrt(occurrences) of each position."""
    positions = dealt(*deal)
    own = positions[first : first + tensor.numel()].reshape(tensor.shape)
    tensor.copy_(torch.bincount(positions, minlength=deal[1])[own].float().rsqrt().to(W.dtype))
