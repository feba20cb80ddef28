"""A deeper graph out of a shallower one's layers, each copy a layer with names of its own."""

import pytest
import torch
from handmade import Hand, aten
from peft_fx.passes.capture.replicate import ReplicateLayers, layer_list, replicated_table, sources
from peft_fx.passes.core.base import run
from torch import nn

from peft_fx.errors import RecipeError
from peft_fx.store.modules import shell
from peft_fx.store.state import state_of

ORDER = (0, 1, 0)


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(2))


def stacked():
    """x -> tanh(layer 1(layer 0(sin x)))."""
    hand = Hand(Deep())
    y = hand.call(aten.sin.default, hand.input("x", torch.randn(3, 4), (0,)))
    for path in ("layers.0", "layers.1"):
        y = hand.call(aten.linear.default, y, hand.tensor(f"{path}.weight"), at=path)
    return hand.output(hand.call(aten.tanh.default, y))


def test_layers_are_copied_in_the_order_given_and_read_under_their_new_names():
    gm = stacked()
    old = dict(gm.layers._modules)
    gm.layers._modules = {str(i): shell(old[str(source)]) for i, source in enumerate(ORDER)}
    (report,) = run((ReplicateLayers("layers", ORDER),), gm)
    linear = gm.graph.find_nodes(op="call_function", target=aten.linear.default)
    assert report.changed == 3 and [n.args[1].target for n in linear] == [f"layers.{i}.weight" for i in range(3)]
    assert [list(n.meta["nn_module_stack"].values())[-1][0] for n in linear] == [f"layers.{i}" for i in range(3)]
    x = torch.randn(5, 4)
    expected = x.sin()
    for source in ORDER:
        expected = expected @ old[str(source)].weight.mT
    torch.testing.assert_close(gm(x)[0], expected.tanh())


def test_the_table_has_the_copies_tied():
    table = replicated_table(state_of(stacked()).table, "layers", ORDER)
    assert [r.path for r in table.records] == ["", "layers", *(f"layers.{i}" for i in range(3))]
    assert table.tied_to("layers.0.weight") == ("layers.2.weight",) and table.tied_to("layers.1.weight") == ()


def test_what_cannot_be_replicated_is_refused():
    assert layer_list(state_of(stacked()).table) == "layers" and sources([[0, 2], [0, 1]], 2) == [0, 1, 0]
    with pytest.raises(RecipeError, match="range .0, 3. is not within the model's 2 layers"):
        sources([[0, 3]], 2)
    with pytest.raises(RecipeError, match="once each is needed"):
        run((ReplicateLayers("layers", (0, 2)),), stacked())
