"""What `capture` takes besides a model: symbolically traced graphs and exported programs."""

import copy

import pytest
import torch
from captures import LORA, assert_adapts, capture
from families import assert_equal
from torch import fx, nn

import peft_fx


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2))
        self.head = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 2))

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


@pytest.fixture
def image():
    return torch.randn(2, 3, 8, 8)


def test_a_symbolically_traced_graph_is_captured_as_its_model_is(image):
    model = Small()
    traced, graph = capture(fx.symbolic_trace(model), image), capture(model, image)
    assert [n.target for n in traced.graph.nodes] == [n.target for n in graph.graph.nodes]
    assert list(traced.state_dict()) == list(graph.state_dict())
    assert all(p is q for p, q in zip(traced.parameters(), model.parameters(), strict=True))
    for training in (True, False):
        graph.train(training), traced.train(training)
        torch.manual_seed(0)
        wanted = graph(image)
        torch.manual_seed(0)
        torch.testing.assert_close(traced(image), wanted, atol=1e-6, rtol=1e-6)  # batch norm has moved on in between


@pytest.mark.parametrize("target", ["head.0", "body.0"])
def test_a_symbolically_traced_graph_takes_adapters_by_module_path(image, target):
    model = Small().eval()
    assert_adapts(capture(fx.symbolic_trace(model), image), model, target, (image,))


@pytest.mark.parametrize("training", [True, False])
def test_an_exported_program_is_captured_in_its_one_mode(image, training):
    model = Small().train(training)
    program = torch.export.export(model, (image,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    graph = peft_fx.capture(program)
    assert list(graph.state_dict()) == list(model.state_dict())
    x = torch.randn(5, 3, 8, 8)
    assert_equal(graph, copy.deepcopy(model), (x,), atol=0, rtol=0)
    if not training:
        assert_adapts(graph, model, "head.2", (x,))
    with pytest.raises(peft_fx.GraphError, match="ExportedProgram"):
        graph.train(not graph.peft_fx.mode.training)


def test_a_program_that_torch_exported_from_an_adapted_graph_is_captured_with_its_numbers(image):
    tuned = peft_fx.apply(capture(Small().eval(), image), {**LORA, "target_modules": ["head.0"]})
    graph = peft_fx.capture(torch.export.export(tuned, (image,)))
    assert torch.equal(graph(image), tuned(image))
    assert {n for n, _ in graph.named_parameters()} == {n for n, _ in tuned.named_parameters()}


def test_a_captured_graph_is_not_captured_again(image):
    graph = capture(Small(), image)
    for again in (graph, fx.Transformer(graph).transform()):
        with pytest.raises(peft_fx.CaptureError, match="is a captured graph already"):
            capture(again, image)
