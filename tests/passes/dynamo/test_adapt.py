"""Dynamo's graphs get the model's names back, and readers of targets their operators."""

import torch
from handmade import Hand, aten, targets
from peft_fx.passes.core.base import run
from peft_fx.passes.dynamo.adapt import NameInputs, ReadersToAten, with_inputs
from torch import nn
from torch.nn import functional as F

from peft_fx.planning.modules import module_table


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight


IDS = torch.arange(3)


def by_hand(model):
    """As Dynamo has it: one input for the tied tensor, torch's functions."""
    hand = Hand()
    ids, weight = hand.input("ids", IDS), hand.input("l_self_head_weight_", model.head.weight)
    y = hand.call(F.embedding, ids, weight, at="L.embed")
    y = hand.call(torch.relu, y)
    return hand.output(hand.call(F.linear, y, weight, at="L.head"))


def test_an_input_that_is_a_tensor_of_the_model_is_read_under_its_reader_s_name():
    model = Tied()
    gm = by_hand(model)
    names = NameInputs({1: (model.head.weight, ("embed.weight", "head.weight"))}, module_table(model))
    (report,) = run((names,), gm)
    readers = {n.target: next(iter(n.users)).target for n in gm.graph.find_nodes(op="get_attr")}
    assert report.changed == 1 and readers == {"embed.weight": F.embedding, "head.weight": F.linear}
    graph, ours = with_inputs(gm)
    assert ours == [] and not graph.find_nodes(op="get_attr")
    assert [n.name for n in graph.find_nodes(op="placeholder")] == ["ids", "l_self_head_weight_"]


def test_only_what_reads_a_target_is_traced_to_operators():
    model = Tied()
    gm = by_hand(model)
    names = NameInputs({1: (model.head.weight, ("embed.weight", "head.weight"))}, module_table(model))
    (_, report) = run((names, ReadersToAten(frozenset({"head.weight"}), {})), gm)
    assert report.changed == 1 and targets(gm) == [F.embedding, torch.relu, aten.linear.default]
    expected = model.head(torch.relu(model.embed(IDS)))
    assert torch.equal(gm(IDS, model.head.weight)[0], expected)
