"""What `capture` takes and keeps: call signatures, front ends, ties and shared modules, buffers; and what it refuses."""

import copy
import dataclasses

import pytest
import tiny
import torch
from families import assert_equal
from torch import fx, nn

import peft_fx

LORA = {"peft_type": "LORA", "r": 2, "init_lora_weights": False}


def capture(model, *args, **options):
    return peft_fx.capture(model, args, **options)


def lora(tuned, target):
    """The factors of one target, as (A, B)."""
    return [tuned.get_parameter(f"peft_fx.adapters.default.{target}.weight.lora_{x}") for x in "AB"]


def names(graph):
    return {n.target for n in graph.graph.nodes if n.op == "get_attr"}


def assert_adapts(graph, model, target, inputs):
    """LoRA on `target` equals the model with the update added to that weight."""
    tuned = peft_fx.apply(graph, {**LORA, "target_modules": [target]})
    A, B = lora(tuned, target)
    updated = copy.deepcopy(model)
    weight = updated.get_submodule(target).weight
    with torch.no_grad():
        weight += (8 / 2) * (B.flatten(1) @ A.flatten(1)).reshape(weight.shape)
    torch.testing.assert_close(tuned(*inputs), updated(*inputs), atol=1e-5, rtol=1e-5)


# Call signatures and outputs.


class Signature(nn.Module):
    """Linear, called in the way that a test needs; `function`: (module, linear, *args, **kwargs)."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)


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


torch.export.register_dataclass(Result, serialized_type_name="test_capture.Result")


class NestedOutput(Signature):
    def forward(self, x):
        y = self.linear(x)
        return {"a": (y, [y.sum(), {"b": x * 2}]), "result": Result(y.mean(), [y, y + 1]), "none": None, "three": 3}


class Single(Signature):
    def forward(self, x):
        return (self.linear(x),)


X, Y, Z = torch.randn(3, 4), torch.randn(3, 4), torch.randn(3, 4)
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
    ((torch.randn(3, 5), 3), {"flag": True, "name": "none"}, r"captured with x = \('any', 4\), called with \(3, 5\)"),
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
    with pytest.raises(peft_fx.GraphError, match=r"x = \('any', 5, 4\), called with \(2, 6, 4\)"):
        graph(torch.randn(2, 6, 4))


def test_a_tensor_where_none_was_captured_is_refused_not_ignored():
    graph = peft_fx.capture(Loop(), (torch.randn(2, 5, 4),), {"mask": None})
    with pytest.raises(peft_fx.GraphError, match=r"mask = None, called with \(2, 4\)"):
        graph(torch.randn(2, 5, 4), mask=torch.zeros(2, 4))


def test_dynamic_shapes_are_the_users_when_given():
    model, batch = Single(), torch.export.Dim("batch", min=2, max=64)
    graph = capture(model, torch.randn(3, 4), dynamic_shapes={"x": {0: batch}})
    x = torch.randn(7, 4)
    assert torch.equal(graph(x)[0], model(x)[0])
    fixed = capture(model, torch.randn(3, 4), dynamic_shapes=None)
    with pytest.raises(peft_fx.GraphError, match=r"x = \(3, 4\), called with \(7, 4\)"):
        fixed(x)


def test_another_structure_than_the_captured_one_is_torchs_error():
    with pytest.raises((ValueError, TypeError)):
        capture(Positional(), X, Y)(X)


# Front ends.


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


# Ties, shared modules, views, buffers.


class Shared(nn.Module):
    """One linear layer under two names, called twice."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.block = nn.ModuleDict({"second": self.first, "own": nn.Linear(4, 4)})

    def forward(self, x):
        return self.block["own"](self.block["second"](torch.relu(self.first(x))))


def test_a_module_under_two_names_is_one_target_read_twice():
    model = Shared()
    graph = capture(model, X)
    assert list(graph.state_dict()) == list(model.state_dict())
    assert graph.get_parameter("first.weight") is graph.get_parameter("block.second.weight") is model.first.weight
    assert {"first.weight", "block.own.weight"} <= names(graph) and "block.second.weight" not in names(graph)
    assert_equal(graph, copy.deepcopy(model), (X,))
    assert_adapts(graph, model, "first", (X,))
    tuned = peft_fx.apply(graph, {**LORA, "target_modules": ["first", "second"]})
    assert sum("lora_A" in n for n, _ in tuned.named_parameters()) == 1


@pytest.fixture(scope="module")
def tied():
    torch.manual_seed(0)
    model = tiny.tied_llama()
    return model, peft_fx.capture(model)


IDS = {"input_ids": torch.tensor([[3, 5, 8, 1], [9, 2, 4, 7]]), "attention_mask": torch.ones(2, 4, dtype=torch.long)}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def test_a_tie_stays_one_parameter_and_each_reader_names_its_own(tied):
    model, graph = tied
    assert graph.get_parameter(EMBEDDING) is graph.get_parameter(HEAD) is model.lm_head.weight
    assert {n.target: {str(u.target) for u in n.users} for n in graph.graph.nodes if n.target in (EMBEDDING, HEAD)} == {
        EMBEDDING: {"aten.embedding.default"}, HEAD: {"aten.linear.default"}}  # fmt: skip
    assert list(graph.state_dict()) == list(model.state_dict())
    assert [n for n, _ in graph.named_parameters()] == [n for n, _ in model.named_parameters()]


@pytest.mark.parametrize("verb", [lambda g: g, copy.deepcopy, lambda g: peft_fx.apply(g, {**LORA, "target_modules": ["q_proj"]})],
                         ids=["capture", "deepcopy", "apply"])  # fmt: skip
def test_every_verb_keeps_the_tie(tied, verb):
    graph = verb(tied[1])
    assert graph.get_parameter(EMBEDDING) is graph.get_parameter(HEAD)


@pytest.mark.parametrize("target, other", [("embed_tokens", HEAD), ("lm_head", EMBEDDING)])
def test_an_adapter_on_one_end_of_a_tie_leaves_the_other(tied, target, other):
    model, graph = tied
    tuned = peft_fx.apply(graph.eval(), {**LORA, "target_modules": [target]})
    parameter = next(n for n in tuned.graph.nodes if n.op == "get_attr" and n.target == other)
    (reader,) = parameter.users
    assert str(reader.target) in ("aten.linear.default", "aten.embedding.default")
    assert reader.args[1 if other == HEAD else 0] is parameter
    untied = copy.deepcopy(model).eval()
    untied.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    A, B = [p for n, p in tuned.named_parameters() if "lora_" in n]
    with torch.no_grad():
        if target == "lm_head":
            untied.lm_head.weight += 4 * B @ A
        else:
            untied.model.embed_tokens.weight += 4 * (B @ A).T
    torch.testing.assert_close(tuned(**IDS).logits, untied(**IDS).logits, atol=1e-5, rtol=1e-5)


class Views(nn.Module):
    """Weights read through transposition, slices, splits, as attention and mixtures of experts do."""

    def __init__(self):
        super().__init__()
        self.plain, self.sliced = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        x = x @ self.plain.weight.t()
        q, k = self.sliced.weight.chunk(2)
        x = torch.cat([x @ q.t(), nn.functional.linear(x, k)], -1)
        return self.attention(x[None], x[None] + 1, x[None] - 1, need_weights=False)[0]


@pytest.mark.parametrize("target", ["plain", "sliced"])
def test_a_parameter_read_through_views_is_a_target(target):
    torch.manual_seed(0)
    model = Views().eval()
    graph = capture(model, X)
    assert_equal(graph, copy.deepcopy(model), (Y,))
    assert_adapts(graph, model, target, (Y,))


class Buffers(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("kept", torch.randn(4))
        self.register_buffer("passing", torch.randn(4), persistent=False)
        self.register_buffer("absent", None)
        self.register_buffer("unread", torch.randn(2))
        self.linear, self.unused = nn.Linear(4, 4), nn.Linear(4, 3)
        self.register_parameter("nothing", None)
        self.frozen = nn.Parameter(torch.randn(4), requires_grad=False)
        self.constant = torch.randn(4)

    def forward(self, x):
        return (
            self.linear(x) + self.kept + self.passing + self.frozen + self.constant + torch.tensor([1.0, 2.0, 3.0, 4.0])
        )


def test_the_state_dict_is_the_models_whatever_is_read():
    model = Buffers()
    graph = capture(model, X)
    assert list(graph.state_dict()) == list(model.state_dict())
    assert all(
        v is w
        for v, w in zip(
            graph.state_dict(keep_vars=True).values(), model.state_dict(keep_vars=True).values(), strict=True
        )
    )
    assert dict(graph.named_buffers())["passing"] is model.passing
    assert [p.requires_grad for p in graph.parameters()] == [p.requires_grad for p in model.parameters()]
    assert_equal(graph, copy.deepcopy(model), (Y,), atol=0, rtol=0)
    tuned = peft_fx.apply(graph, {**LORA, "target_modules": ["linear"]})
    assert [n for n in tuned.state_dict() if not n.startswith("peft_fx.")] == list(model.state_dict())
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in Buffers().parameters()]


def test_loading_a_state_dict_into_the_model_is_seen_by_the_graph():
    model, other = Buffers(), Buffers()
    graph = capture(model, X)
    other.passing, other.constant = model.passing, model.constant
    model.load_state_dict(other.state_dict())
    assert torch.equal(graph(Y), other(Y))
    graph.load_state_dict(Buffers().state_dict())
    assert torch.equal(graph(Y), model(Y))


class Free(nn.Module):
    """No parameters at all."""

    def forward(self, x):
        return (
            nn.functional.dropout(x.cumsum(-1), 0.5, self.training) + torch.arange(x.shape[0], device=x.device)[:, None]
        )


def test_a_model_without_parameters_is_captured():
    model = Free()
    graph = capture(model, X)
    for training in (True, False):
        model.train(training), graph.train(training)
        torch.manual_seed(0)
        wanted = model(Y)
        torch.manual_seed(0)
        assert torch.equal(graph(Y), wanted)


def test_a_bf16_model_is_captured_as_it_is():
    torch.manual_seed(0)
    model = tiny.llama(attention_dropout=0.1).to(torch.bfloat16)
    graph = peft_fx.capture(model)
    for training in (True, False):
        assert_equal(graph.train(training), copy.deepcopy(model).train(training), IDS, atol=1e-2, rtol=2e-2)
    assert {p.dtype for p in graph.parameters()} == {torch.bfloat16}
    assert torch.equal(graph(**IDS).logits, model.eval()(**IDS).logits)


class Checkpointed(nn.Module):
    """no_grad, inference of a part, and detach."""

    def __init__(self):
        super().__init__()
        self.frozen, self.linear = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        with torch.no_grad():
            h = self.frozen(x)
            with torch.enable_grad():
                h = h + self.linear(x)
        with torch.set_grad_enabled(self.training):
            h = h * self.linear(x)
        return h + self.linear(x).detach()


def test_gradients_stop_where_the_model_stops_them():
    model = Checkpointed()
    graph = capture(model, X)
    assert not any("grad_enabled" in str(n.target) for n in graph.graph.nodes)
    assert_equal(graph, copy.deepcopy(model), (Y,), atol=0, rtol=0)


# Refusals.


def branching(x):
    return x * 2 if x.sum() > 0 else x


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.inner = nn.Linear(4, 4), nn.ModuleList([nn.Identity()])
        self.inner.append(type("Gate", (nn.Module,), {"forward": lambda self, x: branching(x)})())

    def forward(self, x):
        return self.inner[1](self.linear(x))


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4, momentum=None)

    def forward(self, x):
        return self.norm(x)


class Chosen(Signature):
    """A size that depends on data, and a branch on it."""

    def forward(self, x):
        rows = x[x.sum(1) > 0]
        return self.linear(rows) if rows.shape[0] else x


REFUSALS = {
    "a branch on data": (lambda: (Branching(), (X,)), r"Branching cannot be captured in \w+ mode: in module inner\.1 \(Gate\).*torch\.where"),
    "no inputs for a plain module": (lambda: (Single(), ()), r"Single needs example inputs: capture\(model, args=\(x,\)\)"),
    "a branch on a size that depends on data": (lambda: (Chosen(), (X,)), r"Chosen cannot be captured in \w+ mode: .*torch\.where"),
    "not a model": (lambda: (lambda x: x, (X,)), "takes an nn.Module or an ExportedProgram, got function"),
    "an error of the model's own": (lambda: (Single(), (torch.randn(3, 5),)), r"in module linear \(Linear\).*Remedy"),
    "batch norm that reads its counter": (lambda: (Counting(), (X,)), r"in train mode: in module norm \(BatchNorm1d\).*model\.eval\(\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_captured_is_refused_with_module_cause_and_remedy(name):
    make, message = REFUSALS[name]
    model, args = make()
    with pytest.raises(peft_fx.CaptureError, match=message) as error:
        peft_fx.capture(model, args)
    assert "\n" not in str(error.value)


def test_a_hugging_face_model_with_unknown_inputs_asks_for_them():
    model = tiny.llama()
    model.main_input_name = "waves"
    with pytest.raises(
        peft_fx.CaptureError, match=r"takes 'waves'.*pass kwargs=\{'waves': \.\.\.\} to capture \(known: input_ids"
    ):
        peft_fx.capture(model)


def test_a_failed_capture_leaves_mode_and_config_as_they_were():
    model = Branching().eval()
    with pytest.raises(peft_fx.CaptureError):
        capture(model, X)
    assert not any(m.training for m in model.modules())
    t5 = tiny.t5()
    with pytest.raises(peft_fx.CaptureError):
        peft_fx.capture(t5, kwargs={"input_ids": X})
    assert t5.config.use_cache and t5.decoder.config.use_cache and t5.training
