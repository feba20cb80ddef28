"""Adapters in a graph: the form that is decided, and what is inserted for it."""

import pytest
import torch
from handmade import Hand, aten
from peft_fx.passes.core.base import run
from peft_fx.passes.inject.inject import Inject, lower, tagged
from torch import nn

import peft_fx
from peft_fx.errors import RecipeError
from peft_fx.store.lazy import copy_graph
from peft_fx.store.modules import derive
from peft_fx.store.state import state_of

X = torch.randn(3, 4)
LORA = {"peft_type": "LORA", "r": 2, "target_modules": ["layer"], "init_lora_weights": False}


class Layer(nn.Module):
    def __init__(self, read_twice):
        super().__init__()
        self.layer, self.read_twice = nn.Linear(4, 5), read_twice


def by_hand(read_twice=False):
    """layer(x), plus the sum of the weight in a second output if it is read twice."""
    torch.manual_seed(0)
    hand = Hand(Layer(read_twice))
    x, W = hand.input("x", X, (0,)), hand.tensor("layer.weight")
    y = hand.call(aten.linear.default, x, W, hand.tensor("layer.bias"), at="layer")
    return hand.output(y, *([hand.call(aten.sum.default, W)] if read_twice else []))


def again(tuned, lowering):
    """The base graph over the adapter's tensors, and the pass that puts it in."""
    state = state_of(tuned)
    gm = derive(tuned, copy_graph(state.base.graph), state)
    chosen = tuple(p.__class__(**{**vars(p), "lowering": lowering}) for p in state.recipe["default"].placements)
    return gm, Inject(chosen)


# read twice, form asked for, form that is decided
FORMS = [
    (False, "auto", "activation"),
    (False, "activation", "activation"),
    (False, "weight", "weight"),
    (True, "auto", "weight"),
]


@pytest.mark.parametrize(("read_twice", "asked", "form"), FORMS)
def test_the_form_decided_is_the_one_inserted_and_gives_the_definition_s_numbers(read_twice, asked, form):
    tuned = peft_fx.apply(by_hand(read_twice), LORA)
    gm, inject = again(tuned, asked)
    (decided,) = lower(gm.graph, inject.placements, {})
    (report,) = run((inject,), gm)
    assert decided.form == form and report.changed == 1
    assert {n.meta["custom"]["peft_fx"]["form"] for n in tagged(gm)} == {form}
    A, B = (tuned.get_parameter(f"peft_fx.adapters.default.layer.on_weight.lora_{x}") for x in "AB")
    updated = gm.layer.weight + 4 * B @ A
    torch.testing.assert_close(gm(X)[0], nn.functional.linear(X, updated, gm.layer.bias))
    if read_twice:
        torch.testing.assert_close(gm(X)[1], updated.sum())


def test_a_form_that_there_is_not_is_refused_and_the_graph_stays():
    gm, inject = again(peft_fx.apply(by_hand(read_twice=True), LORA), "activation")
    code = str(gm.graph)
    with pytest.raises(RecipeError, match="layer.weight: refused: lowering='activation' was asked for, but the weight"):
        run((inject,), gm)
    assert str(gm.graph) == code


def test_without_placements_there_is_nothing_to_do():
    gm = by_hand()
    assert Inject(()).idle(gm) and run((Inject(()),), gm)[0].changed == 0
