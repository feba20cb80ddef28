"""Sizes of 1 in an example, and what reaches the screen when torch.export has something to say."""

import traceback

import pytest
import torch
from torch import nn
from torch.export import Dim

import peft_fx as fx


class Branches(nn.Module):
    """Computes something else for one row."""

    def forward(self, x):
        return x * 2 if x.shape[0] == 1 else x


class Adds(nn.Module):
    def forward(self, x, y):
        return x + y


class OnValues(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return x if self.linear(x).sum() > 0 else -x


def ones(*shapes):
    return tuple(torch.randn(shape) for shape in shapes)


CONV = nn.Conv2d(1, 3, 3)
ANY = {  # model, shapes of the example, its dynamic_shapes, shapes that the graph takes
    "rows": (nn.Linear(4, 2), [(1, 4)], "auto", [[(3, 4)], [(1, 4)]]),
    "rows and steps": (nn.Linear(4, 2), [(1, 1, 4)], "auto", [[(3, 2, 4)], [(1, 5, 4)], [(6, 1, 4)], [(1, 1, 4)]]),
    "rows alone, since the convolution has one channel": (CONV, [(1, 1, 8, 8)], "auto", [[(3, 1, 8, 9)], [(1, 1, 5, 5)]]),
    "rows of two inputs": (Adds(), [(1, 4), (1, 4)], "auto", [[(3, 4), (3, 4)], [(1, 4), (1, 4)]]),
    "a named size": (nn.Linear(4, 2), [(1, 4)], ({0: Dim("rows")},), [[(3, 4)], [(1, 4)]]),
    "a size asked for": (nn.Linear(4, 2), [(1, 4)], ({0: Dim.DYNAMIC},), [[(3, 4)]]),
}  # fmt: skip
KEPT = {  # model, shapes of the example, its dynamic_shapes, a call that is refused, what the refusal says
    "by the model": (CONV, [(1, 1, 8, 8)], "auto", [(3, 2, 8, 8)], "axis 1 of .* is fixed"),
    "by a branch": (Branches(), [(1, 4)], "auto", [(3, 4)], "axis 0 of x is fixed, since the example had size 1 there"),
    "by what it stands for": (Adds(), [(3, 4), (1, 4)], "auto", [(3, 4), (3, 4)], "axis 0 of y is fixed, since the example had size 1 there"),
    "by request": (nn.Linear(4, 2), [(1, 4)], None, [(3, 4)], "axis 0 of .* example of size 2 or more"),
}  # fmt: skip


@pytest.mark.parametrize("model, example, sizes, calls", ANY.values(), ids=ANY)
def test_a_size_of_1_in_an_example_is_a_size_like_others(model, example, sizes, calls):
    graph = fx.capture(model, ones(*example), dynamic_shapes=sizes)
    for shapes in calls:
        given = ones(*shapes)
        assert torch.equal(graph(*given), model(*given))


@pytest.mark.parametrize("model, example, sizes, call, message", KEPT.values(), ids=KEPT)
def test_a_size_of_1_that_is_kept_is_right_and_other_calls_are_told_so(model, example, sizes, call, message, capfd):
    graph, given = fx.capture(model, ones(*example), dynamic_shapes=sizes), ones(*example)
    assert torch.equal(graph(*given), model(*given))
    with pytest.raises(fx.GraphError, match=message):
        graph(*ones(*call))
    assert capfd.readouterr() == ("", "")


def test_a_refusal_prints_nothing_and_has_one_short_cause(capfd):
    with pytest.raises(fx.CaptureError, match="OnValues cannot be captured in eval mode") as info:
        fx.capture(OnValues(), ones((2, 4)))
    assert capfd.readouterr() == ("", "")
    text = traceback.format_exception(info.value)
    cause = info.value.__cause__
    assert cause is not None and cause.__cause__ is None and cause.__suppress_context__
    assert "self.linear(x).sum() > 0" in "".join(text[:10]) and len(text) < 20  # the model's line comes first


def test_an_impossible_request_names_its_remedy():
    with pytest.raises(fx.CaptureError, match="dynamic_shapes asks for sizes"):
        fx.capture(CONV, ones((2, 1, 8, 8)), dynamic_shapes=({1: Dim("channels")},))
