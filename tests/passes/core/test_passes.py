"""The pass manager, the splicer and the injection pass: every check is named, every node is traceable."""

import itertools
import re
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from graphs import captured, model_of, tuned
from peft_fx.passes.core.base import Pass, op_counts, run, settings
from peft_fx.passes.core.fakes import fake_mode_of
from peft_fx.passes.core.splice import Splicer
from peft_fx.passes.inject.inject import tag_of
from tiny import build

import peft_fx
from peft_fx.errors import GraphError
from peft_fx.store.lazy import copy_graph
from peft_fx.store.modules import derive
from peft_fx.store.state import state_of

aten = torch.ops.aten


def copied(name="mixed"):
    graph = captured(name)
    state = state_of(graph)
    new = derive(graph, copy_graph(state.base.graph), state)
    new.recompile()
    return new


@dataclass(frozen=True)
class Nothing(Pass):
    def call(self, gm):
        return 0


@dataclass(frozen=True)
class Double(Pass):
    """Adds every tanh to itself."""

    def call(self, gm):
        nodes = [n for n in gm.graph.nodes if n.target is aten.tanh.default]
        for node in nodes:
            with gm.graph.inserting_after(node):
                new = gm.graph.call_function(aten.add.Tensor, (node, node))
            new.meta = dict(node.meta)
            node.replace_all_uses_with(new, delete_user_cb=lambda user, new=new: user is not new)
        return len(nodes)


@dataclass(frozen=True)
class Demanding(Nothing):
    def requires(self, gm):
        raise GraphError("a graph without tanh")


@dataclass(frozen=True)
class Boastful(Nothing):
    def ensures(self, gm):
        raise GraphError("no tanh is left")


@dataclass(frozen=True)
class UsesBeforeItIsThere(Pass):
    """Moves a node in front of what it needs."""

    def call(self, gm):
        first = next(n for n in gm.graph.nodes if n.target is aten.embedding.default)
        gm.graph.output_node().prev.append(first)
        return 1


@dataclass(frozen=True)
class ReadsWhatIsNotThere(Pass):
    def call(self, gm):
        next(n for n in gm.graph.nodes if n.op == "get_attr").target = "nowhere"
        return 1


@dataclass(frozen=True)
class Stumbles(Pass):
    def call(self, gm):
        raise KeyError("something")


FAULTS = {
    Demanding(): "pass Demanding does not get what it requires: a graph without tanh",
    Boastful(): "pass Boastful left an invalid graph: no tanh is left",
    UsesBeforeItIsThere(): "pass UsesBeforeItIsThere left an invalid graph: .*used before it has been defined",
    ReadsWhatIsNotThere(): "pass ReadsWhatIsNotThere left an invalid graph: .*nowhere",
}


@pytest.mark.parametrize("faulty", FAULTS, ids=lambda p: p.name)
def test_a_pass_that_breaks_its_contract_is_named(faulty):
    with pytest.raises(GraphError, match=FAULTS[faulty]):
        run((Nothing(), faulty, Double()), copied())


def test_an_error_in_a_pass_keeps_its_type_and_notes_the_pass():
    with pytest.raises(KeyError, match="something") as info:
        run((Nothing(), Stumbles()), copied())
    assert info.value.__notes__ == ["in pass Stumbles"]


def test_reports_tell_what_changed_and_how_long_it_took(monkeypatch):
    gm = copied()
    seen = []
    clock = itertools.count()  # of a second per look
    monkeypatch.setattr("peft_fx.passes.core.base.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    with settings(on_report=lambda report, graph: seen.append((report.name, graph))):
        reports = run((Nothing(), Double()), gm)
    assert [(r.name, r.changed, r.op_difference) for r in reports] == [
        ("Nothing", 0, {}),
        ("Double", 1, {"add.Tensor": 1}),
    ]
    assert seen == [("Nothing", gm), ("Double", gm)] and [r.seconds for r in reports] == [1, 1]
    run((Nothing(),), gm)
    assert len(seen) == 2


ORDERS = {(): ["Double", "Nothing", "Double"], ("Double",): ["Nothing"], ("Nothing", "Unknown"): ["Double", "Double"]}


@pytest.mark.parametrize("left_out", ORDERS, ids=str)
def test_passes_run_in_order_and_can_be_left_out_by_name(left_out):
    gm = copied()
    before = op_counts(gm)["add.Tensor"]
    with settings(disable=left_out):
        reports = run((Double(), Nothing(), Double()), gm)
    assert [r.name for r in reports] == ORDERS[left_out]
    assert op_counts(gm)["add.Tensor"] - before == ORDERS[left_out].count("Double")


def test_settings_end_with_their_block_even_on_an_error():
    with pytest.raises(GraphError), settings(disable=("Double",)):
        run((Demanding(),), copied())
    assert run((Double(),), copied())[0].changed == 1


def test_the_verbs_run_under_the_settings_and_keep_their_reports():
    names = []
    with settings(on_report=lambda report, _: names.append(report.name)):
        graph = tuned(captured("mixed"), {"target_modules": ["plain", "head"]}, lowering="activation")
        peft_fx.merge(graph)
    assert names == ["Inject", "PointAtFolded", "Inject"]
    (report,) = state_of(graph).reports
    assert (report.name, report.changed) == ("Inject", 2) and report.op_difference["linear.default"] == 4


def test_a_failing_pass_leaves_the_caller_s_graph_alone(monkeypatch):
    graph = tuned(captured("mixed"), {"target_modules": ["plain"]})
    code, nodes = graph.code, len(graph.graph.nodes)
    monkeypatch.setattr("peft_fx.passes.inject.inject.Inject.ensures", Boastful.ensures)
    with pytest.raises(GraphError, match="pass Inject left an invalid graph"):
        peft_fx.apply(graph, {"peft_type": "LORA", "target_modules": ["head"]}, "second")
    assert graph.code == code and len(graph.graph.nodes) == nodes


# Splicing ----------------------------------------------------------------------------------------------------------------

CONSTANT = torch.ones(8)


def with_no_grad(x):
    with torch.no_grad():
        return (x * 2,)


LOSSY = {
    "a tensor constant": (lambda x: (x + CONSTANT,), "tensor constant|convert all Tensors"),
    "a number made a tensor": (lambda x: (x * torch.tensor(2.0),), "tensor constant|literal device"),
    "no_grad": (with_no_grad, r"use \.detach\(\)"),
    "a literal device": (lambda x: (x + torch.zeros(8, device="cpu"),), "new_zeros"),
    "a default device": (lambda x: (x @ torch.eye(8),), "new_zeros"),
}


def spliced(gm, function, static="test"):
    node = next(n for n in gm.graph.nodes if n.target is aten.tanh.default)
    return node, Splicer(gm, fake_mode_of(gm))(function, static, [node], node, {"splice": 0, "target": "here"})


@pytest.mark.parametrize("case", LOSSY)
def test_a_function_that_tracing_would_distort_is_refused(case):
    function, match = LOSSY[case]
    gm = copied()
    with pytest.raises(Exception, match=match) as info:
        spliced(gm, function)
    assert isinstance(info.value, GraphError)


def test_a_spliced_function_computes_what_it_computes_in_eager():
    gm = copied()
    node, (result,) = spliced(gm, lambda x: (torch.sin(x) + x.new_ones(8),))
    gm.graph.output_node().args = ((result,),)
    reference = copied()
    tanh = next(n for n in reference.graph.nodes if n.name == node.name)
    reference.graph.output_node().args = ((tanh,),)
    for graph in (gm, reference):
        graph.graph.lint()
        graph.recompile()
    x = torch.randint(0, 11, (3, 9))
    assert torch.equal(gm(x), torch.sin(reference(x)) + 1)


@pytest.fixture(scope="module")
def deep():
    """A 4-layer Llama with every linear layer adapted, and the signatures that were traced for it."""
    torch.manual_seed(0)
    graph = peft_fx.capture(build_llama(4))
    traced, trace = [], Splicer.trace
    Splicer.trace = lambda self, function, values, tag: (
        traced.append(tag["target"]) or trace(self, function, values, tag)
    )
    try:
        return graph, peft_fx.apply(graph, {"peft_type": "LORA", "r": 4, "target_modules": "all-linear"}), traced
    finally:
        Splicer.trace = trace


def build_llama(layers):
    model = build("llama").config
    model.num_hidden_layers = layers
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM(model).eval()


def test_each_distinct_signature_is_traced_once(deep):
    _, graph, traced = deep
    assert len(peft_fx.explain(graph).rows) == 28
    assert len(traced) <= 4, traced  # square, up / gate, down; o_proj's input has other strides
    assert all(".layers.0." in target for target in traced)


def test_every_new_node_has_a_value_a_place_and_a_tag(deep):
    base, graph, _ = deep
    names = {n.name for n in base.graph.nodes}
    new = [n for n in graph.graph.nodes if n.name not in names]
    calls = [n for n in new if n.op == "call_function"]
    assert len(calls) >= 28 * 4
    for node in new:
        assert node.meta.get("val") is not None
        if node.op == "call_function":
            tag = tag_of(node)
            assert tag.keys() >= {"splice", "adapter", "target", "method", "role"} and tag["method"] == "LORA"
            path = [path for path, _ in node.meta["nn_module_stack"].values()][-1]
            assert tag["target"] == f"{path}.weight"


def test_every_value_is_what_the_node_computes(deep):
    """Shapes and dtypes in the metadata, evaluated at a size, are those of the tensors that flow."""
    *_, graph = deep[:2]
    symbols = {}
    tokens = torch.arange(15).reshape(3, 5) % 32
    arguments = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    checked = 0

    class Check(torch.fx.Interpreter):
        def run_node(self, node):
            nonlocal checked
            result = super().run_node(node)
            value = node.meta.get("val")
            if isinstance(result, torch.Tensor) and isinstance(value, torch.Tensor):
                assert result.dtype == value.dtype, node
                for have, said in zip(result.shape, value.shape, strict=True):
                    if isinstance(said, int):
                        assert have == said, node
                    elif said.node.expr.is_symbol:
                        assert symbols.setdefault(said.node.expr, have) == have, node
                    else:
                        assert said.node.expr.subs(symbols) == have, node
                    checked += 1
            return result

    flat = torch.utils._pytree.tree_leaves(((), arguments))
    with torch.no_grad():
        Check(graph).run(*flat, enable_io_processing=False)
    assert checked > 500 and set(symbols.values()) == {3, 5}


def symbols_of(graph, adapted):
    found = set()
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and bool(tag_of(node).get("role")) is adapted:
            found |= set(re.findall(r"\b[su]\d+\b", str(value.shape)))
    return found


@pytest.mark.parametrize(
    "name, targets", [("llama", "all-linear"), ("mixed", ["embed", "conv", "plain"]), ("mixtral", ["q_proj"])]
)
def test_copied_nodes_use_the_graph_s_own_symbols(name, targets):
    graph = tuned(captured(name), {"target_modules": targets})
    assert symbols_of(graph.graph, True) and symbols_of(graph.graph, True) <= symbols_of(captured(name).graph, False)
    modes = {
        id(n.meta["val"].fake_mode)
        for n in graph.graph.nodes
        if isinstance(n.meta.get("val"), torch._subclasses.FakeTensor)
    }
    assert len(modes) == 1


def test_capturing_twice_does_not_mix_symbols_or_modes():
    first, second = peft_fx.capture(model_of("mixed"), (torch.ones(2, 6, dtype=torch.long),)), captured("mixed")
    assert fake_mode_of(first) is not fake_mode_of(second)
