"""Regions see their operands alone: how values get in, and how literals take their place."""

import torch
from handmade import Hand, aten, body
from peft_fx.passes.core.regions import AUTOCAST, operand, operands, put_literal, region_of, seen_inside

OPTIONS = ("cpu", torch.bfloat16, False, False)  # off: it changes no number


def with_region():
    """x, y -> x * 2 in a region; y is read nowhere. Returns the module, the call and y."""
    hand = Hand()
    x, y = hand.input("x", torch.randn(3)), hand.input("y", torch.randn(3))
    inside = body(lambda x: (torch.mul(x, 2.0),), torch.randn(3))
    call = hand.call(AUTOCAST, *OPTIONS, hand.region("body", inside), x)
    return hand, call, y


def test_a_region_is_found_by_its_call_and_ordinary_nodes_have_none():
    hand, call, y = with_region()
    assert region_of(hand.gm, call) is hand.gm.body and region_of(hand.gm, y) is None
    assert operands(call) == (5, (call.args[5],))


def test_a_value_from_outside_becomes_one_operand_more_and_only_once():
    hand, call, y = with_region()
    inner = operand(hand.gm.body, call, y)
    assert operands(call)[1][-1] is y and inner.op == "placeholder" and inner.meta["val"] is y.meta["val"]
    assert seen_inside(hand.gm, y, (call,)) is inner and len(operands(call)[1]) == 2
    assert seen_inside(hand.gm, y, ()) is y
    assert len(hand.gm.body.graph.find_nodes(op="placeholder")) == 2
    hand.gm.body.graph.lint()


def test_a_literal_takes_an_operand_s_place_inside_the_region():
    hand, call, y = with_region()
    inner = operand(hand.gm.body, call, y)
    product = next(n for n in hand.gm.body.graph.nodes if n.op == "call_function")
    product.args = (product.args[0], inner)
    put_literal(hand.gm, call, y, 3.0)
    assert product.args[1] == 3.0 and len(operands(call)[1]) == 1
    hand.gm.body.recompile()
    assert torch.equal(hand.gm.body(torch.ones(3))[0], torch.full((3,), 3.0))


def test_a_literal_takes_a_node_s_place_in_an_ordinary_call():
    hand = Hand()
    x = hand.input("x", torch.randn(3))
    double = hand.call(aten.mul.Tensor, x, hand.call(aten.sum.default, x))
    put_literal(hand.gm, double, double.args[1], 2.0)
    assert double.args == (x, 2.0)
