"""Regions without gradients become operators and detached results."""

import operator

import pytest
import torch
from handmade import Hand, aten, body, targets
from peft_fx.passes.capture.inline import DETACH, GRAD_REGION, InlineGradRegions
from peft_fx.passes.core.base import run

from peft_fx.errors import GraphError


def with_region(enabled):
    """x -> sin(x) + x, the sine in a region."""
    hand = Hand()
    x = hand.input("x", torch.randn(3))
    call = hand.call(GRAD_REGION, enabled, hand.region("body", body(lambda x: (torch.sin(x),), torch.randn(3))), x)
    return hand.output(hand.call(aten.add.Tensor, hand.call(operator.getitem, call, 0), x))


@pytest.mark.parametrize(("enabled", "slope"), [(False, 1.0), (True, 2.0)])
def test_a_region_s_operators_stand_in_the_graph_and_give_the_gradients_that_it_gave(enabled, slope):
    gm = with_region(enabled)
    with pytest.raises(GraphError, match="region is left"):
        InlineGradRegions().ensures(gm)
    (report,) = run((InlineGradRegions(),), gm)
    assert report.changed == 1 and "body" not in gm._modules
    assert targets(gm) == [torch.sin, *([] if enabled else [DETACH]), aten.add.Tensor]
    x = torch.zeros(3, requires_grad=True)
    (y,) = gm(x)
    y.sum().backward()
    assert torch.equal(y, x) and torch.equal(x.grad, torch.full((3,), slope))


def test_a_graph_without_regions_stays_as_it_is():
    hand = Hand()
    gm = hand.output(hand.call(aten.sin.default, hand.input("x", torch.randn(3))))
    (report,) = run((InlineGradRegions(),), gm)
    assert (report.changed, report.op_difference) == (0, {})
