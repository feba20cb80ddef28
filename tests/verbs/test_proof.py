"""The proof that a stamped graph is the model's, which is by structure: it notices what is wrong without any numbers."""

import operator

import pytest
import torch
from torch import nn

import peft_fx as fx
from peft_fx.store.lazy import copy_graph
from peft_fx.store.modules import derive
from peft_fx.store.state import state_of
from peft_fx.verbs.capture.proof import modes_agree, refuse_difference

aten = torch.ops.aten


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        y = torch.tanh(self.linear(x)) * 2.0 - x[:, [1, 0, 3, 2]]
        y[:, :1].add_(1.0)  # seen through y, though written through a view
        return y + torch.zeros_like(x[:, 2:]).sum() + torch.tensor([1.0, 2.0, 3.0, 4.0], device=x.device)


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return {"last": x, "first": x[0]}


def last(graph, target, op="call_function"):
    return [n for n in graph.nodes if n.op == op and n.target == target][-1]


def change(node, **what):
    for name, value in what.items():
        setattr(node, name, value)


def around(node, target, *args):
    with node.graph.inserting_after(node):
        new = node.graph.call_function(target, (node, *args))
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


WRONG = {
    "the weight of another layer": lambda g: change(
        last(g, "layers.2.linear.weight", "get_attr"), target="layers.1.linear.weight"
    ),
    "another operator": lambda g: change(last(g, aten.tanh.default), target=aten.sigmoid.default),
    "another number": lambda g: change(n := last(g, aten.mul.Tensor), args=(n.args[0], 2.5)),
    "operands the other way round": lambda g: change(n := last(g, aten.sub.Tensor), args=n.args[::-1]),
    "another place written to": lambda g: change(
        n := next(iter(last(g, aten.add_.Tensor).all_input_nodes)), args=(*n.args[:2], 1, 2)
    ),
    "a write that is left out": lambda g: g.erase_node(last(g, aten.add_.Tensor)),
    "part of a value": lambda g: around(last(g, aten.tanh.default), aten.slice.Tensor, 0, 0, 1),
    "a gradient that stops": lambda g: around(last(g, aten.tanh.default), aten.detach.default),
    "an operator more": lambda g: around(last(g, aten.tanh.default), aten.neg.default),
}
RIGHT = {
    "nothing changed": lambda g: None,
    "a slice that takes all": lambda g: around(last(g, aten.tanh.default), aten.slice.Tensor, 0, 0, 2**63 - 1),
    "a view of the same shape": lambda g: around(last(g, aten.tanh.default), aten.view.default, [2, 4]),
}


@pytest.fixture(scope="module", params=["cpu", "meta"])
def captured(request):
    with torch.device(request.param):
        model, x = Stack().eval(), torch.zeros(2, 4)
    return model, fx.capture(model, (x,), dynamic_shapes=None), (x,)


def altered(graph, change):
    new = derive(graph, copy_graph(graph.graph), state_of(graph))
    change(new.graph)
    new.recompile()
    return new


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_a_graph_that_is_wrong_in_one_place_is_noticed(change, captured):
    model, graph, args = captured
    with pytest.raises(fx.GraphError, match="does not give the model's outputs"):
        refuse_difference(model, altered(graph, change), args, {})


@pytest.mark.parametrize("change", RIGHT.values(), ids=RIGHT)
def test_what_computes_the_same_is_the_same(change, captured):
    model, graph, args = captured
    refuse_difference(model, altered(graph, change), args, {})


class Remembers(nn.Module):
    def forward(self, x):
        self.last = x
        self.register_buffer("seen", x + 1)
        return x


def test_a_proof_leaves_the_model_as_it_was():
    linear = nn.Linear(4, 4)
    model = nn.Sequential(linear, nn.Sequential(linear), Remembers()).eval()  # one module has two names
    parameters, own = dict(model.named_parameters()), list(vars(model[2]))
    assert modes_agree(model, (torch.zeros(2, 4),), {})
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert list(vars(model[2])) == own and not list(model.buffers()) and not model.training


def test_what_has_no_fake_is_no_proof(captured):
    model, graph, args = captured
    with pytest.raises(fx.GraphError, match="cannot be compared"):
        refuse_difference(
            model, altered(graph, lambda g: around(last(g, aten.tanh.default), operator.add, "x")), args, {}
        )


class Counts(nn.Module):
    """Writes in training alone, and returns the same."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.calls += 1
        return x * 2


class Stops(nn.Module):
    """Gradients flow in training alone."""

    def forward(self, x):
        with torch.set_grad_enabled(self.training):
            return x * 2


class Detaches(nn.Module):
    def forward(self, x):
        return (x if self.training else x.detach()) * 2


class Refuses(nn.Module):
    def forward(self, x):
        if self.training:
            raise KeyError("training")
        return x


MODES = {  # module -> whether it is the same in both modes
    "linear": (nn.Linear(4, 4), True),
    "dropout of nothing": (nn.Dropout(0.0), True),
    "dropout": (nn.Dropout(0.1), False),
    "statistics": (nn.BatchNorm1d(4), False),
    "a counter": (Counts(), False),
    "gradients that stop": (nn.Sequential(nn.Linear(4, 4), Stops()), False),
    "a value that is detached": (nn.Sequential(nn.Linear(4, 4), Detaches()), False),
    "no training": (Refuses(), False),
}


@pytest.mark.parametrize("module, same", MODES.values(), ids=MODES)
def test_a_module_is_exported_once_if_it_is_the_same_in_both_modes(module, same, monkeypatch):
    module, exported = nn.Sequential(module).eval(), []
    assert modes_agree(module, (torch.ones(2, 4),), {}) is same
    export = torch.export.export
    monkeypatch.setattr(
        "torch.export.export", lambda model, *a, **k: exported.append(model.training) or export(model, *a, **k)
    )
    graph = fx.capture(module, (torch.ones(2, 4),))
    assert exported == [False] if same else exported == [False, True]
    assert torch.equal(graph(torch.ones(3, 4)), module(torch.ones(3, 4))) and not module.training
    if same:
        graph.train(), module.train()
        assert torch.equal(graph(torch.ones(3, 4)), module(torch.ones(3, 4)))
