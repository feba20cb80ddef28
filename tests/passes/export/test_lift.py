"""A graph module as a program, without exporting again."""

import pytest
import torch
from handmade import Hand, aten
from peft_fx.passes.export.lift import lift
from torch import nn
from torch.export.graph_signature import InputKind

from peft_fx.errors import GraphError


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.unread = nn.Linear(4, 5), nn.Parameter(torch.ones(2))
        self.register_buffer("shift", torch.arange(5.0))


def by_hand():
    torch.manual_seed(0)
    hand = Hand(Layers())
    x = hand.input("x", torch.randn(3, 4))
    y = hand.call(aten.linear.default, x, hand.tensor("layer.weight"), hand.tensor("layer.bias"), at="layer")
    return hand.output(hand.call(aten.add.Tensor, y, hand.tensor("shift")))


def test_tensors_become_inputs_ahead_of_the_user_s_and_the_program_runs():
    gm = by_hand()
    graph = str(gm.graph)
    program = lift(gm, {})
    kinds = {spec.target: spec.kind for spec in program.graph_signature.input_specs if spec.target}
    assert kinds == {
        **{name: InputKind.PARAMETER for name in ("layer.weight", "layer.bias", "unread")},
        "shift": InputKind.BUFFER,
    }
    assert list(program.graph_signature.user_inputs) == ["x"] and str(gm.graph) == graph
    assert program.state_dict["layer.weight"] is gm.layer.weight
    x = torch.randn(3, 4)
    assert torch.equal(program.module()(x)[0], gm(x)[0])


def test_a_node_that_is_no_operator_has_no_place():
    gm = by_hand()
    with gm.graph.inserting_before(gm.graph.output_node()):
        gm.graph.call_module("peft_fx.device")
    with pytest.raises(GraphError, match="cannot export .*only operators and parameters"):
        lift(gm, {})
