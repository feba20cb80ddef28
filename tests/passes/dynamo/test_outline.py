"""A graph is cut into blocks, one class for those that are equal."""

import itertools

import pytest
import torch
from handmade import Hand, aten
from peft_fx.passes.core.base import run
from peft_fx.passes.dynamo.outline import Outline, block_classes
from torch import nn

from peft_fx.errors import GraphError


class Stack(nn.Module):
    def __init__(self, widths):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))


def by_hand(*widths):
    """Linear layers in a list, a sine ahead of them."""
    torch.manual_seed(0)
    hand = Hand(Stack(widths).requires_grad_(False))
    y = hand.call(aten.sin.default, hand.input("x", torch.randn(3, widths[0])))
    for i in range(len(widths) - 1):
        path = f"layers.{i}"
        tensors = [hand.tensor(f"{path}.{name}") for name in ("weight", "bias")]
        y = hand.call(aten.linear.default, y, *tensors, at=path)
    return hand.output(y)


# widths, how many classes of blocks besides glue there are
STACKS = {"equal": ((4, 4, 4, 4), 1), "one is wider": ((4, 4, 4, 6), 1), "none are equal": ((4, 5, 6, 7), 0)}


@pytest.mark.parametrize("case", STACKS)
def test_equal_members_of_a_list_share_a_class_and_the_numbers_stay(case):
    widths, classes = STACKS[case]
    gm, x = by_hand(*widths), torch.randn(3, widths[0])
    before, names = gm(x)[0], list(gm.state_dict())
    (report,) = run((Outline(),), gm)
    calls = [n.target for n in gm.graph.find_nodes(op="call_module")]
    assert report.changed == len(calls) and torch.equal(gm(x)[0], before) and list(gm.state_dict()) == names
    repeated = [c for c in block_classes(gm) if sum(type(gm.get_submodule(name)) is c for name in calls) > 1]
    assert len(repeated) == classes


def test_a_graph_that_is_cut_is_not_cut_again():
    gm = by_hand(4, 4, 4)
    run((Outline(),), gm)
    with pytest.raises(GraphError, match="pass Outline does not get what it requires: the graph is cut already"):
        run((Outline(),), gm)
