"""Products with a parameter become `aten.linear`, and no bit changes."""

import pytest
import torch
from handmade import Hand, aten, targets
from peft_fx.passes.capture.linearise import Linearise
from peft_fx.passes.core.base import op_counts, run
from torch import nn


class Weights(nn.Module):
    def __init__(self):
        super().__init__()
        self.W, self.b = nn.Parameter(torch.randn(4, 5)), nn.Parameter(torch.randn(5))


def through_views(h, x):
    flat = h.call(aten.view.default, x, [-1, 4])
    y = h.call(aten.addmm.default, h.tensor("b"), flat, h.tensor("W"))
    return h.call(aten.view.default, y, [2, 3, 5])


# sizes of x, the graph, what it calls afterwards
PRODUCTS = {
    "mm": ((3, 4), lambda h, x: h.call(aten.mm.default, x, h.tensor("W")), ["t", "linear"]),
    "matmul": ((2, 3, 4), lambda h, x: h.call(aten.matmul.default, x, h.tensor("W")), ["t", "linear"]),
    "of a transposed weight": (
        (3, 5),
        lambda h, x: h.call(aten.mm.default, x, h.call(aten.t.default, h.tensor("W"))),
        ["linear"],
    ),
    "with a bias": (
        (3, 4),
        lambda h, x: h.call(aten.addmm.default, h.tensor("b"), x, h.tensor("W")),
        ["t", "linear"],
    ),
    "between views": ((2, 3, 4), through_views, ["t", "linear"]),
    "of two activations": ((3, 4), lambda h, x: h.call(aten.mm.default, x, h.call(aten.t.default, x)), ["t", "mm"]),
    "scaled": ((3, 4), lambda h, x: h.call(aten.addmm.default, h.tensor("b"), x, h.tensor("W"), beta=2), ["addmm"]),
    "of a vector": ((4,), lambda h, x: h.call(aten.matmul.default, x, h.tensor("W")), ["matmul"]),
}


@pytest.mark.parametrize("case", PRODUCTS)
def test_a_product_with_a_parameter_becomes_linear_and_others_stay(case):
    shape, write, calls = PRODUCTS[case]
    torch.manual_seed(0)
    hand, x = Hand(Weights()), torch.randn(shape)
    gm = hand.output(write(hand, hand.input("x", x)))
    before = gm(x)[0]
    (report,) = run((Linearise(),), gm)
    assert report.changed == op_counts(gm)["linear.default"] == ("linear" in calls)
    assert [t.__name__.split(".")[0] for t in targets(gm)] == calls
    assert torch.equal(gm(x)[0], before)
