"""Every module reads a tensor under its own path, though it is one tensor."""

import pytest
import torch
from handmade import Hand, aten
from peft_fx.passes.capture.names import NameParameters
from peft_fx.passes.core.base import run
from torch import nn

from peft_fx.errors import GraphError
from peft_fx.store.state import state_of


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight


def test_a_tied_tensor_is_read_under_the_name_of_the_module_that_reads_it():
    hand, ids = Hand(Tied()), torch.arange(3)
    x = hand.input("x", ids)
    weight = hand.tensor("head.weight")  # the last of its names, as torch.export has it
    y = hand.call(aten.embedding.default, weight, x, at="embed")
    gm = hand.output(hand.call(aten.linear.default, y, weight, at="head"))
    before = gm(ids)[0]
    (report,) = run((NameParameters(state_of(gm).table),), gm)
    reads = gm.graph.find_nodes(op="get_attr")
    assert report.changed == 1 and {n.target for n in reads} == {"embed.weight", "head.weight"}
    assert [next(iter(n.users)).target for n in reads if n.target == "embed.weight"] == [aten.embedding.default]
    assert gm.embed.weight is gm.head.weight and torch.equal(gm(ids)[0], before)
    assert all(isinstance(n.meta["val"], torch._subclasses.FakeTensor) for n in reads)


def test_two_reads_of_one_parameter_become_one():
    hand, x = Hand(nn.Sequential(nn.Linear(4, 4, bias=False))), torch.randn(2, 4)
    y = hand.call(aten.linear.default, hand.input("x", x), hand.tensor("0.weight"), at="0")
    gm = hand.output(hand.call(aten.linear.default, y, hand.tensor("0.weight"), at="0"))
    before = gm(x)[0]
    named = NameParameters(state_of(gm).table)
    with pytest.raises(GraphError, match="more than one get_attr"):
        named.ensures(gm)
    run((named,), gm)
    assert len(gm.graph.find_nodes(op="get_attr")) == 1 and torch.equal(gm(x)[0], before)
