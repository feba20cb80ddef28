"""Packed weights by plain operators, and what is said where that is not all that their layers do."""

import warnings

import handpacked
import pytest
import torch
from handmade import Hand, aten, targets
from peft_fx.passes.core.base import run
from peft_fx.passes.export.unpack import Unpack
from torch import nn

from peft_fx.storage.formats import Format
from peft_fx.storage.packed import Packed

N, K = 64, 64


def inc8():
    hand = handpacked.inc8(N, K)
    return Packed(Format("inc8", (N, K), hand.dtype, hand.facts), hand.tensors)


def gptq():
    hand = handpacked.gptq(N, K)
    return Packed(Format("gptq", (N, K), hand.dtype, hand.facts), hand.tensors)


def bnb8(**facts):
    torch.manual_seed(0)
    tensors = {"packed": torch.randint(-127, 128, (N, K), dtype=torch.int8), "scale": torch.rand(N)}
    return Packed(Format("bnb8", (N, K), torch.float32, facts), tensors)


def by_hand(packed):
    """Two products, one look-up and one plain read of a weight; products in float32, behind a cast where W is in another type."""
    model = nn.Module()
    model.layer = nn.Module()
    model.layer.weight_packed = packed
    hand = Hand(model)
    x, ids = hand.input("x", torch.randn(3, K)), hand.input("ids", torch.tensor([0, 5]))
    tensors = [hand.tensor(name) for name in packed.named("layer.weight")]
    W = hand.call(torch.ops.peft_fx.dequantize.default, tensors, packed.text, at="layer")
    wide = W if packed.dtype == torch.float32 else hand.call(aten.to.dtype, W, torch.float32)
    y = hand.call(aten.linear.default, x, wide, at="layer")
    again = hand.call(aten.linear.default, y, wide, at="layer")
    return hand.output(again, hand.call(aten.embedding.default, W, ids), hand.call(aten.sum.default, W))


@pytest.mark.parametrize("packed, rounded", [
    (inc8(), 2),
    (gptq(), 0),
    (bnb8(threshold=6.0), 2),
    (bnb8(), 0),
], ids=["inc8", "gptq", "bnb8 in evaluation", "bnb8 in training"])  # fmt: skip
def test_products_are_those_with_the_dense_weights_and_rounded_inputs_are_told_of_once(packed, rounded):
    gm = by_hand(packed)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        run([Unpack()], gm)
    messages = [str(w.message) for w in told if "rounded to 8 bits" in str(w.message)]
    assert len(messages) == bool(rounded)
    assert not messages or f"the dense weights: {rounded}, first linear_default." in messages[0]
    assert torch.ops.peft_fx.dequantize.default not in targets(gm)
    x, ids, W = torch.randn(3, K), torch.tensor([0, 5]), packed.dense()
    y, rows, total = gm(x, ids)
    assert torch.equal(y, x @ W.float().t() @ W.float().t())
    assert torch.equal(rows, W[ids]) and torch.equal(total, W.sum())
