"""Grids of blocks, element by element, the last block of an axis cut or whole."""

import itertools

import pytest
import torch

from peft_fx.storage.blocks import ByRows, grid_of, spread
from peft_fx.storage.formats import Format

CASES = [((6, 8), (2, 4)), ((5, 7), (2, 4)), ((3, 4, 5), (1, 4, 2)), ((6, 8), (6, 1)), ((6, 8), (1, 8))]


@pytest.mark.parametrize(("shape", "block"), CASES)
def test_each_element_has_its_block_s_number(shape, block):
    grid = [-(-n // b) for n, b in zip(shape, block, strict=True)]
    numbers = torch.randn(grid)
    full = spread(numbers, block, shape).expand(shape)
    W = torch.randn(shape)
    largest, least = grid_of(W, block, torch.amax), grid_of(W.abs(), block, torch.amax)
    whole = all(n % b == 0 for n, b in zip(shape, block, strict=True))
    for at in itertools.product(*map(range, shape)):
        assert full[at] == numbers[tuple(i // b for i, b in zip(at, block, strict=True))]
    for at in itertools.product(*map(range, grid)):
        part = W[tuple(slice(i * b, (i + 1) * b) for i, b in zip(at, block, strict=True))]
        assert least[at] == part.abs().max()
        assert largest[at] == part.max() or (not whole and largest[at] == max(part.max(), 0))


def test_one_number_broadcasts():
    for one in (torch.tensor(2.0), torch.tensor([2.0]), torch.tensor([[2.0]])):
        assert torch.equal(torch.ones(3, 4) * spread(one, (3, 4), (3, 4)), torch.full((3, 4), 2.0))


class Counting(ByRows):
    """q s, which says how many rows it made."""

    made = 0

    def dequantize(self, tensors, f):
        self.made += f.shape[0]
        return tensors[0] * tensors[1]


@pytest.mark.parametrize(("scale", "made"), [((5, 1), 3), ((1,), 3), ((1, 4), 5)])
def test_only_the_rows_that_are_asked_for(scale, made):
    storage, q, s = Counting(), torch.randn(5, 4), torch.randn(scale)
    ids = torch.tensor([[4], [0], [4]])
    rows = storage.rows([q, s], ids, Format("", (5, 4), torch.float32))
    assert torch.equal(rows, (q * s)[ids]) and storage.made == made
