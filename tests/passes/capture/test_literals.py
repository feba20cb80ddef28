"""Literals that follow the module's mode and device, and how they are baked in again."""

import pytest
import torch
from handmade import Hand, aten, targets
from peft_fx.passes.capture.literals import BakeLiterals, MarkDevice, MarkModes
from peft_fx.passes.core.base import run

from peft_fx.errors import GraphError

CPU = torch.device("cpu")


def dropout(training, more=False):
    hand = Hand(training=training)
    y = hand.call(aten.dropout.default, hand.input("x", torch.randn(64)), 0.5, training)
    return hand.output(hand.call(aten.sin.default, y) if more else y)


def test_a_literal_in_which_two_captures_differ_follows_the_mode():
    gm, x = dropout(True), torch.ones(64)
    (report,) = run((MarkModes(dropout(False)),), gm)
    assert report.changed == 1 and targets(gm) == ["peft_fx.mode", aten.dropout.default]
    assert torch.equal(gm.eval()(x)[0], x) and set(gm.train()(x)[0].tolist()) == {0.0, 2.0}


def test_captures_that_differ_in_more_lock_the_mode_and_say_why():
    gm = dropout(True)
    (report,) = run((MarkModes(dropout(False, more=True)),), gm)
    assert report.changed == 0
    with pytest.raises(GraphError, match="train mode only: train mode runs output where eval mode runs aten::sin"):
        gm.eval()
    assert gm.training


def test_a_device_follows_the_module():
    hand = Hand()
    x = hand.input("x", torch.randn(3))
    gm = hand.output(hand.call(aten.add.Tensor, x, hand.call(aten.ones.default, [3], device=CPU)))
    (report,) = run((MarkDevice(CPU),), gm)
    assert report.changed == 1 and targets(gm) == ["peft_fx.device", aten.ones.default, aten.add.Tensor]
    assert torch.equal(gm(torch.zeros(3))[0], torch.ones(3))
    assert gm.to("meta")(torch.zeros(3, device="meta"))[0].is_meta


@pytest.mark.parametrize("training", [True, False])
def test_baking_leaves_operators_alone_with_the_values_of_now(training):
    gm = dropout(True)
    run((MarkModes(dropout(False)), MarkDevice(CPU)), gm)
    (report,) = run((BakeLiterals(),), gm.train(training))
    assert report.changed == 1 and targets(gm) == [aten.dropout.default]
    assert next(n for n in gm.graph.nodes if n.op == "call_function").args[2] is training
