"""After a merge operators read what it stored: nothing to do, one bias more, or no groups."""

import pytest
import torch
from handmade import Hand, aten
from peft_fx.passes.core.base import run
from peft_fx.passes.inject.fold import PointAtFolded
from torch import nn

import peft_fx
from peft_fx.errors import GraphError
from peft_fx.store.state import state_of
from peft_fx.store.tensors import set_tensor

X = torch.randn(3, 4)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 5, bias=False)


def base_and_pass(**options):
    """The graph without an adapter, and the pass for one's placements."""
    hand = Hand(Layer())
    gm = hand.output(hand.call(aten.linear.default, hand.input("x", X), hand.tensor("layer.weight"), at="layer"))
    tuned = peft_fx.apply(gm, {"peft_type": "LORA", "r": 2, "target_modules": ["layer"], **options})
    return gm, PointAtFolded(state_of(tuned).recipe["default"].placements)


def test_a_weight_of_the_same_looks_needs_nothing():
    gm, point = base_and_pass()
    gm.layer.weight = nn.Parameter(torch.ones(5, 4))
    assert point.idle(gm)
    torch.testing.assert_close(gm(X)[0], X.sum(1, keepdim=True).expand(3, 5))
    gm.layer.weight = nn.Parameter(torch.ones(5, 4, dtype=torch.float64))
    assert not point.idle(gm)
    run((point,), gm)
    (read,) = gm.graph.find_nodes(op="get_attr")
    assert read.meta["val"].dtype == torch.float64


def test_a_bias_that_there_was_not_is_read():
    gm, point = base_and_pass(lora_bias=True)
    set_tensor(gm, "layer.bias", nn.Parameter(torch.arange(5.0)))
    before = gm(X)[0]
    (report,) = run((point,), gm)
    assert report.changed == 1
    torch.testing.assert_close(gm(X)[0], before + torch.arange(5.0))


def test_a_tensor_that_is_not_there_is_found_out():
    gm, point = base_and_pass()
    gm.graph.find_nodes(op="get_attr")[0].target = "gone"
    with pytest.raises(GraphError, match="reads gone, which the module does not have"):
        point.ensures(gm)
