"""One more input says whose adapter each row takes."""

import pytest
import torch
from handmade import Hand, aten
from peft_fx.passes.core.base import run
from peft_fx.passes.inject.mixed import MixedBatch, drop_input
from torch import nn

import peft_fx
from peft_fx.errors import GraphError
from peft_fx.store.lazy import copy_graph
from peft_fx.store.modules import derive
from peft_fx.store.state import state_of

X = torch.randn(4, 3, 6)
NAMES = ("first", "second")
METHODS = {
    "factors": {"peft_type": "LORA", "r": 2, "init_lora_weights": False},
    "a map of the output": {"peft_type": "IA3", "init_ia3_weights": False, "feedforward_modules": []},
}


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 5)


def by_hand(dynamic=(0,)):
    hand = Hand(Layer())
    arguments = [hand.input("x", X, dynamic), hand.tensor("layer.weight"), hand.tensor("layer.bias")]
    return hand.output(hand.call(aten.linear.default, *arguments, at="layer"))


def mixed(base, options):
    """The graph for both adapters, and the graph with each alone."""
    torch.manual_seed(0)
    tuned = base
    for name in NAMES:
        tuned = peft_fx.apply(tuned, {**options, "target_modules": ["layer"]}, name)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if ".adapters." in name:
                parameter.add_(torch.randn_like(parameter))
    state = state_of(tuned)
    gm = derive(tuned, copy_graph(state.base.graph), state)
    (report,) = run((MixedBatch(NAMES, tuple(state.recipe[name].placements for name in NAMES)),), gm)
    assert report.changed == 1
    return gm, [peft_fx.set_adapter(tuned, name) for name in NAMES]


@pytest.mark.parametrize("options", METHODS.values(), ids=METHODS)
def test_each_row_is_its_own_adapter_s(options):
    base = by_hand()
    gm, alone = mixed(base, options)
    ids = torch.tensor([1, -1, 0, 1])
    (found,) = gm(X, adapter_ids=ids)
    expected = [((base, *alone)[i + 1])(X)[0][row] for row, i in enumerate(ids.tolist())]
    torch.testing.assert_close(found, torch.stack(expected))


# the ids, what they are told
IDS = [
    (torch.tensor([0, 0, 2, 0]), "2 is no adapter; expected -1 for the base, 0: first, 1: second"),
    (torch.tensor([0, 0]), "expected one per row, 4 for this batch, given 2"),
    (torch.zeros(4), r"expected a tensor of int64 \(rows,\)"),
]


@pytest.mark.parametrize(("ids", "message"), IDS)
def test_ids_that_do_not_fit_are_refused(ids, message):
    gm, _ = mixed(by_hand(), METHODS["factors"])
    with pytest.raises(GraphError, match=message):
        gm(X, adapter_ids=ids)


def test_rows_that_cannot_be_told_apart_are_refused():
    with pytest.raises(GraphError, match="the number of rows of x was fixed to 4 by capture"):
        mixed(by_hand(dynamic=()), METHODS["factors"])


def test_the_input_can_be_taken_out_again():
    gm, _ = mixed(by_hand(), METHODS["factors"])
    for node in reversed(gm.graph.nodes):
        if node.op == "output":
            node.args = ((gm.graph.find_nodes(op="call_function", target=aten.linear.default)[0],),)
        elif node.op != "placeholder" and not node.users:
            gm.graph.erase_node(node)
    drop_input(gm.graph)
    gm.recompile()
    assert [n.name for n in gm.graph.find_nodes(op="placeholder")] == ["x"]
    torch.testing.assert_close(gm(X)[0], nn.functional.linear(X, gm.layer.weight, gm.layer.bias))
