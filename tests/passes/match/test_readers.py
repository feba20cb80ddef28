"""Who reads a parameter, and whether an operator is recognised behind it."""

import pytest
import torch
from handmade import Hand, aten
from peft_fx.passes.match.readers import describe, groups_of, observed_kinds, parameter_nodes, sites, uses
from torch import nn


class Holder(nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.W = nn.Parameter(torch.randn(*shape))


def linear(h, x, W):
    return h.call(aten.linear.default, x, W)


def turned(h, W, name=aten.t.default):
    return h.call(name, W)


# sizes of W and x, the graph; then [kind, stored transposed, groups], or why its readers are not all recognised
READERS = {
    "linear": ((5, 4), (3, 4), linear, ["linear", False, 1]),
    "linear, transposed": ((4, 5), (3, 4), lambda h, x, W: linear(h, x, turned(h, W)), ["linear", True, 1]),
    "linear, there and back": ((5, 4), (3, 4), lambda h, x, W: linear(h, x, turned(h, turned(h, W))), ["linear", False, 1]),
    "a lookup": ((5, 4), None, lambda h, x, W: h.call(aten.embedding.default, W, x), ["embedding", True, 1]),
    "experts": ((2, 4, 5), (2, 3, 4), lambda h, x, W: h.call(aten.bmm.default, x, W), ["expert", True, 1]),
    "a grouped convolution": ((6, 2, 3), (1, 4, 9), lambda h, x, W: h.call(aten.conv1d.default, x, W, groups=2), ["conv1d", False, 2]),
    "a sum": ((5, 4), (5, 4), lambda h, x, W: h.call(aten.add.Tensor, x, W), "read by aten::add.Tensor"),
    "a view that splits": ((5, 4), (3, 2), lambda h, x, W: linear(h, x, h.call(aten.view.default, W, [10, 2])), "read by aten::view"),
    "itself twice": ((4, 4), None, lambda h, x, W: h.call(aten.linear.default, W, W), "read by aten::linear"),
}  # fmt: skip


@pytest.mark.parametrize("case", READERS)
def test_an_operator_is_recognised_behind_views_that_keep_the_axes(case):
    weight, shape, write, expected = READERS[case]
    hand = Hand(Holder(*weight))
    x = hand.input("x", torch.randn(shape) if shape else torch.arange(3))
    W = hand.tensor("W")
    gm = hand.output(write(hand, x, W))
    found, reason = sites(parameter_nodes(gm.graph)["W"])
    if isinstance(expected, str):
        assert expected in reason and observed_kinds(gm.graph) == {} and describe(found, reason) == reason
        return
    (site,) = found
    assert not reason and observed_kinds(gm.graph) == {"W": expected}
    assert [site.operator.kind, site.stored_transposed, groups_of(site)] == expected
    assert site.x.name == "x" and uses(site.node, site.x) == 1
    assert describe(found, reason) == site.node.target.name()


def test_a_parameter_that_nothing_reads_is_said_to_be_so():
    assert describe([], "") == "no operator of the graph reads this parameter"


def test_readers_that_disagree_have_no_kind():
    hand = Hand(Holder(4, 4))
    x, W = hand.input("x", torch.randn(3, 4)), hand.tensor("W")
    gm = hand.output(linear(hand, x, W), linear(hand, x, turned(hand, W)))
    assert len(sites(parameter_nodes(gm.graph)["W"])[0]) == 2 and observed_kinds(gm.graph) == {}
