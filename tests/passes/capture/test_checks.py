"""Checks of weights go, those of activations stay."""

import torch
from handmade import Hand, aten
from peft_fx.passes.capture.checks import DropWeightChecks
from peft_fx.passes.core.base import op_counts, run
from peft_fx.passes.match.readers import sites, tensor_nodes
from torch import nn

CHECK = aten._assert_tensor_metadata.default


def test_a_weight_that_is_cast_has_one_reader():
    model = nn.Module()
    model.W = nn.Parameter(torch.randn(5, 4).half())
    hand, value = Hand(model), torch.randn(3, 4)
    x, W = hand.input("x", value), hand.tensor("W")
    hand.call(CHECK, x, dtype=torch.float32)
    hand.call(CHECK, W, dtype=torch.float16)
    gm = hand.output(hand.call(aten.linear.default, x, hand.call(aten.to.dtype, W, torch.float32)))
    before = gm(value)[0]
    assert sites(tensor_nodes(gm.graph)["W"])[1]
    (report,) = run((DropWeightChecks(),), gm)
    assert report.changed == 1 == op_counts(gm)["_assert_tensor_metadata.default"]
    found, reason = sites(tensor_nodes(gm.graph)["W"])
    assert not reason and len(found) == 1 and torch.equal(gm(value)[0], before)
