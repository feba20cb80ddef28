"""The form in which a method enters a graph: chosen by counted cost, asked for, or forced by what there is."""

import re

import conformance as c
import pytest
import torch
from methods import cells, label
from peft_fx.passes.forms.cost import BALANCE, LAUNCH, cost
from peft_fx.passes.forms.lowering import forms_of
from peft_fx.passes.inject.inject import tag_of
from torch import nn

import peft_fx as fx
from peft_fx.store.state import state_of


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(256, 512)

    def forward(self, x):
        return self.layer(x)


def rows(graph):
    return {(r.method, r.lowering) for r in fx.explain(graph).rows}


def placed(graph):
    """What the graph's nodes say of themselves."""
    return {(t["adapter"], t["form"]) for t in map(tag_of, graph.graph.nodes) if t.get("role")}


def test_the_form_that_costs_less_at_the_captured_sizes_is_chosen_and_says_so():
    graph = fx.capture(Layer(), kwargs={"x": torch.randn(32, 128, 256)})
    lora = {"peft_type": "LORA", "target_modules": ["layer"]}
    dense = {"peft_type": "FOURIERFT", "n_frequency": 100, "target_modules": ["layer"]}
    assert rows(fx.apply(graph, lora)) == {("LORA", "activation")}
    tuned = fx.apply(graph, dense)
    (row,) = fx.explain(tuned).rows
    share = re.fullmatch(r"the weight form is cheaper here: (0\.\d\d) of the work", row.reason)
    assert row.lowering == "weight" and share and float(share[1]) <= 0.8
    assert rows(fx.apply(graph, dense, lowering="activation")) == {("FOURIERFT", "activation")}
    assert rows(fx.apply(graph, lora, lowering="weight")) == {("LORA", "weight")}


def test_few_rows_are_cheaper_by_the_activation_form_and_many_by_the_weight_form():
    wide_rank = {"peft_type": "LORA", "r": 200, "target_modules": ["layer"]}
    for batch, form in ((1, "activation"), (64, "weight")):
        graph = fx.capture(Layer(), kwargs={"x": torch.randn(batch, 128, 256)})
        assert rows(fx.apply(graph, wide_rank)) == {("LORA", form)}


def test_cost_adds_operations_bytes_and_calls_forward_and_backward():
    x, w = torch.empty(4, 8, device="meta"), torch.empty(16, 8, device="meta")
    forward = cost(lambda x, w: x @ w.mT, [x, w], [False, False])
    assert forward == LAUNCH + 2 * 4 * 8 * 16 + BALANCE * 4 * (4 * 8 + 8 * 16 + 4 * 16)
    assert cost(lambda x, w: x @ w.mT, [x, w], [True, False]) > 2 * forward
    assert cost(lambda x, w: x @ w.mT, [x, w], [True, True]) > 3 * forward


CELLS = {cell[0]: cell for cell in reversed([x for x in cells("PEFT") + cells("DEFINED") if x[2] == "wide"])}


@pytest.mark.parametrize("cell", CELLS.values(), ids=label)
def test_both_forms_give_the_same_outputs_and_gradients(cell, tmp_path):
    _, options, subject = cell
    tuned = fx.apply(c.captured(subject), options)
    chosen = [p for p in state_of(tuned).recipe["default"].placements if p.target.name == "layer.weight"]
    for p in chosen:
        only = "activation" if p.rule.activation_only(p.target, p.config) else "" if forms_of(p.rule) else "weight"
        if only:
            with pytest.raises(fx.RecipeError, match="needs the activation form|the method rewrites the weight"):
                fx.apply(c.captured(subject), options, lowering={"activation": "weight", "weight": "activation"}[only])
            return
    c.randomise(tuned)
    fx.save_adapter(tuned, tmp_path)
    found = {}
    for form in ("activation", "weight"):
        graph = fx.load_adapter(c.captured(subject), tmp_path, trainable=True, lowering=form)
        assert {r.lowering for r in fx.explain(graph).rows if r.target == "layer.weight"} == {form}
        found[form] = c.run(graph, subject), c.gradients(graph, subject, lambda f, g=graph: fx.save_adapter(g, f))
    trained = [k for k, t in found["weight"][1].items() if t.is_floating_point()]
    assert c.error(found["weight"][0], found["activation"][0]) <= 1e-5
    gradients = [{k: found[form][1][k] for k in trained} for form in ("weight", "activation")]
    assert c.error(*gradients) <= 1e-5


def test_the_choice_survives_hotswap_export_and_another_adapter(tmp_path):
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["layer"]}
    tuned = fx.apply(c.captured("wide"), config, lowering="weight")
    fx.save_adapter(tuned, tmp_path / "a")
    fx.hotswap(tuned, tmp_path / "a")
    assert rows(tuned) == {("LORA", "weight")}
    fx.export(tuned, tmp_path / "graph.pt2")
    assert rows(fx.load(tmp_path / "graph.pt2")) == {("LORA", "weight")}
    both = fx.apply(tuned, config, "second", lowering="activation")
    assert [r.lowering for r in fx.explain(both).rows] == ["weight", "activation"]
    assert placed(both) == {("default", "weight"), ("second", "activation")}


def test_a_form_that_is_not_there_is_refused_with_the_reason():
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["attn"]}
    with pytest.raises(fx.RecipeError, match="lowering='activation' was asked for, but the weight is read by"):
        fx.apply(c.captured("attention_cross"), config, lowering="activation")
    dropped = {"peft_type": "LORA", "r": 2, "target_modules": ["layer"], "lora_dropout": 0.1}
    with pytest.raises(
        fx.RecipeError, match="dropout 0.1 on the input needs a form at the operator, but lowering='wei"
    ):
        fx.apply(c.captured("wide"), dropped, lowering="weight")
    with pytest.raises(fx.RecipeError, match="expected one of"):
        fx.apply(c.captured("wide"), dropped, lowering="dense")


def test_explain_tells_the_forms_that_are_in_the_graph_where_adapters_share_a_target():
    shira = {"peft_type": "SHIRA", "r": 1, "target_modules": ["layer"]}
    base = c.captured("wide")
    alone = fx.apply(base, shira, "second")
    both = fx.apply(fx.apply(base, {"peft_type": "LORA", "r": 2, "target_modules": ["layer"]}), shira, "second")
    for graph in (alone, both):
        assert {(r.adapter, r.lowering) for r in fx.explain(graph).rows} == placed(graph)
    first = fx.set_adapter(both, "default")
    planned = fx.explain(first, {"adapters": {"third": shira}}).rows
    assert [r.lowering for r in planned] == [r.lowering for r in fx.explain(both).rows if r.adapter == "second"]
