"""A captured graph is called like its model and returns what it returns; what capture fixed of a call is checked."""

import dataclasses

import pytest
import torch
from captures import Signature, Single, X, Y, Z, capture

import peft_fx


class Positional(Signature):
    def forward(self, x, y, *, scale=None, bias=None):
        return self.linear(x) * y + (0 if bias is None else bias) * (1 if scale is None else scale)


class Default(Signature):
    def forward(self, x, repeat=2, flag=False, name="sum"):
        for _ in range(repeat):
            x = self.linear(x)
        return (x.sum(0) if name == "sum" else x) + (1 if flag else 0)


class Starred(Signature):
    def forward(self, *tensors, **more):
        return self.linear(sum(tensors)) + sum(more.values())


class NestedInput(Signature):
    def forward(self, batch, pair):
        return self.linear(batch["x"] + batch["inner"]["y"]) * pair[0] + pair[1]


@dataclasses.dataclass
class Result:
    loss: torch.Tensor
    states: list


torch.export.register_dataclass(Result, serialized_type_name="test_capture_calls.Result")


class NestedOutput(Signature):
    def forward(self, x):
        y = self.linear(x)
        return {"a": (y, [y.sum(), {"b": x * 2}]), "result": Result(y.mean(), [y, y + 1]), "none": None, "three": 3}


CALLS = {
    "positional": (Positional, (X, Y), {}),
    "positional and keyword": (Positional, (X,), {"y": Y}),
    "keyword-only": (Positional, (X, Y), {"bias": Z}),
    "keywords in another order": (Positional, (), {"bias": Z, "y": Y, "scale": X, "x": X}),
    "defaults": (Default, (X,), {}),
    "constants": (Default, (X, 3), {"flag": True, "name": "none"}),
    "starred": (Starred, (X, Y, Z), {}),
    "starred keywords": (Starred, (X, Y), {"one": Z, "two": X}),
    "nested inputs": (NestedInput, ({"x": X, "inner": {"y": Y}}, (Z, X)), {}),
    "nested outputs": (NestedOutput, (X,), {}),
    "a tuple of one": (Single, (X,), {}),
    "one tensor for two arguments": (Positional, (X, X), {"bias": X}),
    "views of one tensor": (Positional, (X, X[:]), {"bias": X.view(3, 4)}),
}


def another(value):
    """Inputs of the same structure, with other numbers and another batch."""
    return torch.utils._pytree.tree_map(lambda v: torch.randn(6, 4) if isinstance(v, torch.Tensor) else v, value)


@pytest.mark.parametrize("shapes", ["auto", None])
@pytest.mark.parametrize("call", CALLS)
def test_a_graph_is_called_like_the_model_and_returns_what_it_returns(call, shapes):
    make, args, kwargs = CALLS[call]
    if (call, shapes) == ("starred keywords", "auto"):
        with pytest.raises(peft_fx.CaptureError, match=r"by \*\*kwargs; pass dynamic_shapes=None"):
            peft_fx.capture(make(), args, kwargs)
        return
    model = make()
    graph = peft_fx.capture(model, args, kwargs, dynamic_shapes=shapes)
    torch.manual_seed(0)
    if shapes == "auto":
        args, kwargs = another((args, kwargs))
    elif call in ("one tensor for two arguments", "views of one tensor"):
        args, kwargs = (X, Y), {"bias": Z}
    got, wanted = graph(*args, **kwargs), model(*args, **kwargs)
    assert type(got) is type(wanted)
    torch.testing.assert_close(*map(torch.utils._pytree.tree_leaves, (got, wanted)), atol=0, rtol=0)
    assert torch.utils._pytree.tree_structure(got) == torch.utils._pytree.tree_structure(wanted)


@pytest.mark.parametrize("args, kwargs, message", [
    ((X, 4), {"flag": True, "name": "none"}, "captured with repeat = 3, called with 4"),
    ((X, 3), {"flag": False, "name": "none"}, "captured with flag = True, called with False"),
    ((X, 3), {"flag": True, "name": "sum"}, "captured with name = 'none', called with 'sum'"),
    ((X, 3), {"flag": X, "name": "none"}, "captured with flag = True, called with"),
    ((torch.randn(3, 5), 3), {"flag": True, "name": "none"}, r"captured with x = \[any, 4\], called with \[3, 5\]"),
])  # fmt: skip
def test_a_call_with_what_capture_fixed_otherwise_is_refused(args, kwargs, message):
    make, first, keywords = CALLS["constants"]
    graph = peft_fx.capture(make(), first, keywords)
    with pytest.raises(peft_fx.GraphError, match=message):
        graph(*args, **kwargs)


class Loop(Signature):
    def forward(self, x, mask=None):
        h = torch.zeros_like(x[:, 0])
        for t in range(x.shape[1]):
            h = torch.tanh(self.linear(x[:, t]) + h)
        return h if mask is None else h * mask


def test_a_length_that_the_models_loop_fixed_is_refused_not_cut_off():
    model = Loop()
    graph = capture(model, torch.randn(2, 5, 4))
    x = torch.randn(3, 5, 4)
    assert torch.equal(graph(x), model(x))
    with pytest.raises(peft_fx.GraphError, match=r"x = \[any, 5, 4\], called with \[2, 6, 4\]"):
        graph(torch.randn(2, 6, 4))


def test_a_tensor_where_none_was_captured_is_refused_not_ignored():
    graph = peft_fx.capture(Loop(), (torch.randn(2, 5, 4),), {"mask": None})
    with pytest.raises(peft_fx.GraphError, match=r"mask = None, called with \[2, 4\]"):
        graph(torch.randn(2, 5, 4), mask=torch.zeros(2, 4))


def test_dynamic_shapes_are_the_users_when_given():
    model, batch = Single(), torch.export.Dim("batch", min=2, max=64)
    graph = capture(model, torch.randn(3, 4), dynamic_shapes={"x": {0: batch}})
    x = torch.randn(7, 4)
    assert torch.equal(graph(x)[0], model(x)[0])
    fixed = capture(model, torch.randn(3, 4), dynamic_shapes=None)
    with pytest.raises(peft_fx.GraphError, match=r"x = \[3, 4\], called with \[7, 4\]"):
        fixed(x)


def test_another_structure_than_the_captured_one_is_torchs_error():
    with pytest.raises((ValueError, TypeError)):
        capture(Positional(), X, Y)(X)
