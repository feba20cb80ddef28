"""One node refuses calls that differ from the captured one in what capture fixed."""

import pytest
import torch
from handmade import Hand, aten
from peft_fx.passes.capture.inputs import CheckInputs
from peft_fx.passes.core.base import run

from peft_fx.errors import GraphError


def checked(*dynamic, scale=2):
    hand = Hand()
    x = hand.input("x", torch.randn(3, 4), dynamic)
    hand.input("scale", scale)
    gm = hand.output(hand.call(aten.mul.Tensor, x, scale))
    return gm, run((CheckInputs(),), gm)[0]


# axes that may vary, arguments of a call, what it is told
CALLS = {
    "as captured": ((0,), (torch.ones(3, 4), 2), None),
    "another size where it may vary": ((0,), (torch.ones(7, 4), 2), None),
    "another size where it is fixed": ((0,), (torch.ones(3, 5), 2), r"axis 1 of x is fixed.*by the model's code"),
    "another constant": ((0,), (torch.ones(3, 4), 3), "captured with scale = 2, called with 3"),
    "another number of axes": ((0,), (torch.ones(4), 2), r"x = \[any, 4\], called with \[4\]"),
}


@pytest.mark.parametrize("case", CALLS)
def test_a_call_is_held_against_what_was_captured(case):
    dynamic, arguments, message = CALLS[case]
    gm, report = checked(*dynamic)
    assert report.changed == 2
    if message is None:
        assert torch.equal(gm(*arguments)[0], 2 * arguments[0])
    else:
        with pytest.raises(GraphError, match=message):
            gm(*arguments)


def test_where_nothing_was_fixed_there_is_no_check():
    hand = Hand()
    gm = hand.output(hand.call(aten.sin.default, hand.input("x", torch.randn(3, 4), (0, 1))))
    (report,) = run((CheckInputs(),), gm)
    assert (report.changed, report.op_difference) == (0, {})
