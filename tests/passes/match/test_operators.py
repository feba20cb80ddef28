"""The table of operators, and how their calls are read."""

import pytest
import torch
from handmade import Hand, aten
from peft_fx.passes.match.operators import OPERATORS, full_args, keeps_axes, schema_name

# name of a view, its arguments behind the tensor, sizes of the tensor, whether out and in axes stay whole
VIEWS = [
    ("t", (), (3, 4), True),
    ("transpose.int", (0, 1), (3, 4), True),
    ("transpose.int", (-1, -2), (2, 3, 4), True),
    ("transpose.int", (0, 1), (2, 3, 4), False),
    ("permute", ([0, 2, 1],), (2, 3, 4), True),
    ("permute", ([2, 0, 1],), (2, 3, 4), False),
    ("to.dtype", (torch.float64,), (3, 4), True),
    ("view", ([4, 3],), (3, 4), False),
    ("slice.Tensor", (0, 0, 2), (3, 4), False),
]


@pytest.mark.parametrize(("name", "arguments", "sizes", "whole"), VIEWS, ids=lambda v: str(v))
def test_views_that_leave_the_axes_of_a_weight_whole(name, arguments, sizes, whole):
    packet, _, overload = name.partition(".")
    hand = Hand()
    x = hand.input("x", torch.randn(sizes))
    node = hand.call(getattr(getattr(aten, packet), overload or "default"), x, *arguments)
    assert schema_name(node) == f"aten::{name}" and keeps_axes(node) == whole


def test_only_operators_have_a_schema_s_name():
    hand = Hand()
    x = hand.input("x", torch.randn(3))
    assert schema_name(x) == schema_name(hand.call(torch.sin, x)) == ""


def test_arguments_that_were_left_out_are_the_schema_s_defaults():
    hand = Hand()
    x, w = hand.input("x", torch.randn(1, 4, 6, 6)), hand.input("w", torch.randn(2, 2, 3, 3))
    node = hand.call(aten.conv2d.default, x, w, None, [1, 1], groups=2)
    assert full_args(node) == [x, w, None, [1, 1], [0, 0], [1, 1], 2]
    operator = OPERATORS[schema_name(node)]
    assert (operator.kind, full_args(node)[operator.groups]) == ("conv2d", 2)


@pytest.mark.parametrize("name", [n for n in OPERATORS if n.startswith("aten::")])
def test_every_position_in_the_table_is_the_argument_of_that_name(name):
    packet, _, overload = name.removeprefix("aten::").partition(".")
    operator = OPERATORS[name]
    names = [a.name for a in getattr(getattr(aten, packet), overload or "default")._schema.arguments]
    assert operator.bias is None or names[operator.bias] == "bias"
    assert operator.groups is None or names[operator.groups] == "groups"
    assert names[operator.x] in ("input", "indices", "self")
    assert {names[i] for i in operator.weight} <= {"weight", "mat2", "self"}
