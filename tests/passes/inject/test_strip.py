"""Taking every splice out again leaves the base graph."""

import pytest
import torch
from handmade import Hand, aten
from peft_fx.passes.core.base import run
from peft_fx.passes.inject.inject import tagged
from peft_fx.passes.inject.strip import StripSplices
from torch import nn

import peft_fx
from peft_fx.errors import GraphError


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.layer = nn.Conv1d(4, 4, 1, groups=2, bias=False), nn.Linear(6, 5, bias=False)


X = torch.randn(3, 4, 6)
CASES = {
    "at the operators": {"peft_type": "LORA", "r": 2, "target_modules": ["conv", "layer"]},
    "with biases that there were not": {"peft_type": "LORA", "r": 2, "target_modules": ["layer"], "lora_bias": True},
    "at the weights": {"peft_type": "GLORA", "r": 2, "target_modules": ["layer"]},
    "before the operator": {"peft_type": "OFT", "r": 2, "oft_block_size": 0, "target_modules": ["layer"]},
}


def by_hand():
    hand = Hand(Layers())
    x = hand.input("x", X, (0,))
    y = hand.call(aten.conv1d.default, x, hand.tensor("conv.weight"), None, [1], [0], [1], 2, at="conv")
    return hand.output(hand.call(aten.linear.default, y, hand.tensor("layer.weight"), None, at="layer"))


def structure(gm):
    """Operators, literals and what they read, by position."""
    place = {node: i for i, node in enumerate(gm.graph.nodes)}
    return [(n.op, str(n.target), str(torch.fx.map_arg((n.args, n.kwargs), place.__getitem__))) for n in place]


@pytest.mark.parametrize("lowering", ["activation", "weight"])
@pytest.mark.parametrize("case", CASES)
def test_the_base_graph_comes_back(case, lowering):
    base = by_hand()
    if case == "at the weights":
        lowering = "weight"  # its only form
    gm = peft_fx.apply(base, CASES[case], lowering=lowering)
    with pytest.raises(GraphError, match="nodes of adapters are left"):
        StripSplices().ensures(gm)
    (report,) = run((StripSplices(),), gm)
    assert report.changed >= 1 and not tagged(gm)
    assert sorted(structure(gm)) == sorted(structure(base)) and torch.equal(gm(X)[0], base(X)[0])
