"""What a captured graph keeps of its model: ties, shared modules, views, buffers, dtypes, where gradients stop."""

import copy

import pytest
import tiny
import torch
from captures import LORA, X, Y, assert_adapts, capture
from families import assert_equal
from torch import nn

import peft_fx


def names(graph):
    return {n.target for n in graph.graph.nodes if n.op == "get_attr"}


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


@pytest.mark.slow
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
