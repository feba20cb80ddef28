import numpy as np
import pytest
import torch
from handpacked import cut, stream

from peft_fx.storage.bits import nearest, pack, pack_whole, replaced, unpack, unpack_whole

widths = pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])


@widths
@pytest.mark.parametrize("turned", [False, True])
def test_a_stream_of_bits(bits, turned):
    codes = np.random.default_rng(bits).integers(0, 2**bits, (5, 64))
    words = stream(codes, bits)
    read = words.t().contiguous().t() if turned else words
    assert torch.equal(unpack(read, bits).int(), torch.from_numpy(codes).int())
    assert torch.equal(pack(torch.from_numpy(codes), bits), words)


def test_a_stream_of_one_word_in_a_column():
    """Its transpose calls itself contiguous, with strides that are not."""
    words = torch.tensor([[0x76543210, 0x01234567]])
    assert unpack(words.int().t(), 4).tolist() == [[0, 1, 2, 3, 4, 5, 6, 7], [7, 6, 5, 4, 3, 2, 1, 0]]


def test_a_stream_of_three_bits_that_ends_within_its_words():
    codes = torch.arange(40)[None] % 8
    assert unpack(pack(codes, 3)[:, :4], 3)[:, :40].tolist() == codes.tolist()


@widths
def test_codes_that_lie_in_one_word_each(bits):
    codes = np.random.default_rng(bits).integers(0, 2**bits, (5, 47))
    words = cut(codes, bits)
    assert torch.equal(unpack_whole(words, bits)[:, :47], torch.from_numpy(codes).int())
    assert torch.equal(pack_whole(torch.from_numpy(codes), bits), words)


def test_the_nearest_code_stays_within_bounds_and_finite():
    W = torch.tensor([-9.0, 0.26, 0.74, 9.0, float("inf"), 1.0])
    scale = torch.tensor([1.0, 0.5, 0.5, 1.0, 1.0, 0.0])
    assert nearest(W, scale, 3, 7).tolist() == [0.0, 4.0, 4.0, 7.0, 7.0, 3.0]


def test_what_was_replaced_comes_back():
    held = {"a": object(), "b": object()}
    old = dict(held)
    undo = replaced(held, {"a": 1})
    assert held == {"a": 1, "b": old["b"]}
    undo()
    assert held == old


def test_nothing_is_replaced_that_is_not_there():
    held = {"a": 0}
    with pytest.raises(KeyError):
        replaced(held, {"a": 1, "b": 2})
    assert held == {"a": 0}
