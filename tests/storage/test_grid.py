"""Grids: what a packed weight can be made of, the nearest of it, and rounding that keeps products."""

import handpacked
import pytest
import torch

from peft_fx.engine.storing import packed_again
from peft_fx.storage.formats import Format
from peft_fx.storage.grids import DAMPING, Grid, compensated
from peft_fx.storage.packed import Packed
from peft_fx.storage.schemes import scheme
from peft_fx.target import Target


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def bnb4(W, kind, nested=False, dtype=torch.float32):
    functional = pytest.importorskip("bitsandbytes").functional
    packed, state = functional.quantize_4bit(W, blocksize=64, compress_statistics=nested, quant_type=kind)
    tensors = {"packed": packed, "absmax": state.absmax, "code": state.code}
    if nested:
        tensors |= {"absmax2": state.state2.absmax, "code2": state.state2.code, "offset": state.offset}
    facts = {"type": kind, "block": 64, "nested": state.state2.blocksize if nested else 0}
    return Packed(Format("bnb4", tuple(W.shape), dtype, facts), tensors)


def bnb8(W):
    f = Format("bnb8", tuple(W.shape), torch.float32)
    empty = Packed(f, {"packed": torch.empty(0), "scale": torch.empty(0)})
    return empty.again(scheme("bnb8").quantize(W, empty))


PACKED = {
    "nf4": lambda W: bnb4(W, "nf4"),
    "fp4": lambda W: bnb4(W, "fp4"),
    "nested": lambda W: bnb4(W, "nf4", nested=True),
    "bnb8": bnb8,
}


@pytest.fixture(params=PACKED)
def packed(request):
    return PACKED[request.param](random(24, 64) * 0.02)


def grid_of(packed):
    return scheme(packed.format.scheme).grid(list(packed.tensors.values()), packed.format)


def test_a_packed_weight_lies_on_its_grid_and_packs_to_the_same_bits(packed):
    grid, W = grid_of(packed), packed.dense()
    codes = grid.nearest(W)
    assert torch.equal(grid.numbers(codes), W)
    again = packed.again(scheme(packed.format.scheme).pack(codes, packed))
    assert torch.equal(again.dense(), W)


def test_the_nearest_is_the_nearest(packed):
    grid, W = grid_of(packed), packed.dense() + random(24, 64, seed=1) * 0.01
    every = grid.levels.float()[:, None, None] * grid.scale + grid.offset
    distance = (every.expand(-1, 24, 64) - W).abs()
    found = (grid.numbers(grid.nearest(W)) - W).abs()
    assert torch.allclose(found, distance.amin(0), rtol=1e-5, atol=1e-7)


def test_offsets_and_negative_and_empty_scales():
    grid = Grid(torch.arange(4), torch.tensor([[0.5], [-0.5], [0.0]]), torch.tensor([[1.0], [1.0], [7.0]]))
    W = torch.tensor([[1.1, 2.4], [0.9, -0.4], [3.0, 9.0]])
    assert torch.equal(grid.numbers(grid.nearest(W)), torch.tensor([[1.0, 2.5], [1.0, -0.5], [7.0, 7.0]]))


def inputs(n, rows=512):
    return random(rows, n, seed=2) @ (torch.eye(n) + random(n, n, seed=3) / n**0.5)


def test_compensated_is_the_definition_column_by_column():
    """GPTQ without blocks: each column's loss goes at once to those behind, by the inverse of what is left of H."""
    n, W = 12, random(6, 12, seed=4)
    X = inputs(n).double()
    grid = Grid(torch.arange(-3, 4), torch.tensor(0.5), torch.tensor(0.0))
    H = X.mT @ X
    codes = compensated(W, grid, H.float())
    order = H.diagonal().argsort(descending=True).tolist()
    damped, w = H + DAMPING * H.diagonal().mean() * torch.eye(n), W.double()
    expected = torch.empty(6, n, dtype=torch.int64)
    for k, j in enumerate(order):
        rest = order[k:]
        inverse = damped[rest][:, rest].inverse()
        expected[:, j] = grid.nearest(w[:, j])
        lost = (w[:, j] - grid.numbers(expected[:, j])) / inverse[0, 0]
        w[:, rest] -= lost[:, None] * inverse[0]
    assert torch.equal(codes, expected)


@pytest.mark.parametrize("n", [64, 192])  # one block of columns, and more
def test_compensated_loses_less_of_the_products_than_the_nearest(n):
    W, X = random(32, n, seed=5), inputs(n)
    grid = Grid(torch.arange(-4, 5), W.abs().amax(1, keepdim=True) / 4, torch.tensor(0.0))
    lost = [(X @ (grid.numbers(c) - W).mT).norm() for c in (compensated(W, grid, X.mT @ X), grid.nearest(W))]
    assert lost[0] < 0.8 * lost[1]


def test_inputs_that_are_always_zero_get_the_nearest():
    W, X = random(8, 16, seed=6), inputs(16)
    X[:, [3, 9]] = 0
    grid = Grid(torch.arange(-4, 5), torch.tensor(0.3), torch.tensor(0.0))
    codes = compensated(W, grid, X.mT @ X)
    assert torch.equal(codes[:, [3, 9]], grid.nearest(W)[:, [3, 9]])
    assert torch.equal(compensated(W, grid, torch.zeros(16, 16)), grid.nearest(W))


def test_the_weight_that_comes_is_not_written_to():
    W = random(8, 16, seed=7)
    before = W.clone()
    compensated(W, Grid(torch.arange(-4, 5), torch.tensor(0.3), torch.tensor(0.0)), torch.eye(16))
    assert torch.equal(W, before)


HANDPACKED = {
    "hqq": lambda: handpacked.hqq(96, 128),
    "gptq": lambda: handpacked.gptq(96, 128),
    "awq": lambda: handpacked.awq(96, 128),
}


@pytest.mark.parametrize("name", HANDPACKED)
def test_weights_packed_by_hand_lie_on_their_grids(name):
    hand = HANDPACKED[name]()
    p = Packed(Format(hand.scheme, (96, 128), torch.float32, hand.facts), hand.tensors)
    grid = grid_of(p)
    codes = grid.nearest(hand.W.float())
    torch.testing.assert_close(grid.numbers(codes).double(), hand.W, rtol=1e-3, atol=1e-5)
    again = p.again(scheme(name).pack(codes, p))
    assert all(torch.equal(t, again.tensors[n]) for n, t in p.tensors.items())


def test_zero_points_take_an_update_that_groups_have_in_common():
    hand = HANDPACKED["hqq"]()
    p = Packed(Format("hqq", (96, 128), torch.float32, hand.facts), hand.tensors)
    groups = p.tensors["scale"].numel()
    delta = (random(groups, 1, seed=8) * 0.01).expand(-1, 96 * 128 // groups).reshape(96, 128)
    new = p.again(scheme("hqq").fold(delta, p))
    assert torch.equal(new.tensors["W_q"], p.tensors["W_q"])
    torch.testing.assert_close(new.dense(), p.dense() + delta, rtol=1e-4, atol=1e-6)
    rounded = p.again(scheme("hqq").quantize(p.dense() + delta, p)).dense()
    assert (new.dense() - p.dense() - delta).norm() < 1e-3 * (rounded - p.dense() - delta).norm()


def test_a_merge_lets_zero_points_take_what_they_can():
    """Codes stay as they are for an update that groups have in common; the base's tensors are nobody else's."""
    hand = HANDPACKED["hqq"]()
    p = Packed(Format("hqq", (96, 128), torch.float32, hand.facts), hand.tensors)
    groups, target = p.tensors["scale"].numel(), Target("layer", "weight", "linear", (96, 128))
    common = (random(groups, 1, seed=8) * 0.01).expand(-1, 96 * 128 // groups).reshape(96, 128)
    X = inputs(128)
    for storage in ("requantize", "calibrated"):
        new = packed_again(p, p.dense() + common, target, storage, X.mT @ X)
        assert torch.equal(new.tensors["W_q"], p.tensors["W_q"]) and not torch.equal(
            new.tensors["zero"], p.tensors["zero"]
        )
        assert not {t.data_ptr() for t in new.tensors.values()} & {t.data_ptr() for t in p.tensors.values()}
        other = packed_again(p, p.dense() + random(96, 128, seed=9) * 0.1, target, storage, X.mT @ X)
        assert not torch.equal(other.tensors["W_q"], p.tensors["W_q"])
