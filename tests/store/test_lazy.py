"""Code and copies of graphs are made for who asks; unmerge runs the graph from before the merge; memory is used again."""

import copy
import gc
import inspect
import io
import linecache
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from graphs import bits, captured, inputs, model_of, output, same_bits, tuned
from peft_fx.passes.core.base import settings
from torch.fx.graph_module import _loader

import peft_fx
from peft_fx.engine import memory
from peft_fx.engine.memory import Memory
from peft_fx.store import state
from peft_fx.store.state import state_of

TARGETS = {"target_modules": ["embed", "conv", "plain"], "r": 4}
PLAIN = {"target_modules": ["turned", "plain", "head"], "r": 4}  # folded weights of the shapes that they replace


def fresh(config=PLAIN):
    return tuned(captured("mixed"), config, 1)


def has_code(graph):
    return "forward" in vars(type(graph))


def output_shape(graph):
    return graph(**{name: x.to("meta") for name, x in inputs("mixed").items()}).shape


def edit(graph):
    """Makes a graph yield its negative."""
    end = graph.graph.output_node()
    (value,) = end.all_input_nodes
    with graph.graph.inserting_before(end):
        end.replace_input_with(value, graph.graph.call_function(torch.neg, (value,)))
    graph.recompile()


# Code --------------------------------------------------------------------------------------------------------------------

LOOKS = {
    "a call": lambda g: output(g, "mixed"),
    "forward": lambda g: g.forward,
    "code": lambda g: g.code,
    "recompile": lambda g: g.recompile(),
    "deep copy": lambda g: has_code(copy.deepcopy(g)) and g.recompile(),
}


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("make", [fresh, lambda: peft_fx.merge(fresh())], ids=["adapted", "merged"])
def test_code_is_there_for_whoever_looks(look, make):
    graph = make()
    assert not has_code(graph)
    LOOKS[look](graph)
    assert has_code(graph) and "def forward(self, ids)" in graph.code
    assert list(inspect.signature(graph.forward).parameters) == ["ids"]


@pytest.mark.parametrize("make", [fresh, lambda: peft_fx.merge(fresh())], ids=["adapted", "merged"])
def test_many_threads_may_call_a_graph_first(make):
    graph = make()
    expected = output(make(), "mixed")
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda _: output(graph, "mixed"), range(16)):
            assert torch.equal(found, expected)


def test_a_function_compiled_with_a_graph_that_has_no_code_yet_is_one_graph():
    graph, x = fresh(), inputs("mixed")
    compiled = torch.compile(lambda **x: graph(**x) * 2, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**x), output(graph, "mixed") * 2)


def test_a_graph_without_code_is_called_behind_a_graph_break():
    graph, x = fresh(), inputs("mixed")

    def call(**x):
        torch._dynamo.graph_break()
        return graph(**x) * 2

    torch.testing.assert_close(torch.compile(call, backend="aot_eager")(**x), output(graph, "mixed") * 2)


def test_export_takes_a_graph_without_code():
    graph = fresh()
    torch.testing.assert_close(output(peft_fx.export(graph).module(), "mixed"), output(fresh(), "mixed"))


def sources():
    gc.collect()
    return set(_loader.eval_cache) | {name for name in linecache.cache if "eval_with_key" in name}


def test_a_base_forgets_traces_of_configs_that_came_once(monkeypatch):
    monkeypatch.setattr(state, "TRACES", 4)
    base = copy.deepcopy(captured("mixed"))  # with a table of that size
    for alpha in range(1, 9):
        graph = peft_fx.apply(base, peft_fx.LoraConfig(target_modules=["plain"], r=4, lora_alpha=alpha))
        assert 0 < len(state_of(base).base.traces) <= 4
    once = peft_fx.apply(captured("mixed"), peft_fx.LoraConfig(target_modules=["plain"], r=4, lora_alpha=8))
    assert graph.code == once.code


def test_sources_go_with_their_code():
    """torch keeps the source of all code that it has generated: a text as long as the model, at each change of adapters."""
    graph = fresh()
    before = sources()
    for _ in range(5):
        other = peft_fx.set_adapter(graph, ())
        output(other, "mixed")
        name = other.forward.__code__.co_filename
        assert name in sources() and "def forward" in "".join(linecache.getlines(name))
        del other
        assert name not in sources()
    assert sources() == before


# Graphs ------------------------------------------------------------------------------------------------------------------


def test_unmerge_runs_the_graph_from_before_the_merge():
    graph = fresh()
    back = peft_fx.unmerge(peft_fx.merge(graph))
    assert back._kept is graph._kept and back.code == graph.code
    assert same_bits(bits(back), bits(graph)) and torch.equal(output(back, "mixed"), output(graph, "mixed"))
    assert state_of(back) == state_of(graph) and state_of(back).acted is None
    assert peft_fx.explain(back).rows == peft_fx.explain(graph).rows
    twin = copy.deepcopy(back)
    assert torch.equal(output(twin, "mixed"), output(graph, "mixed"))
    again = peft_fx.unmerge(peft_fx.merge(twin))
    assert again._kept is graph._kept and torch.equal(output(again, "mixed"), output(graph, "mixed"))


@pytest.mark.parametrize("edited", ["before", "merged", "back"])
def test_no_graph_is_changed_through_another(edited):
    graph, expected = fresh(), output(fresh(), "mixed")
    merged = peft_fx.merge(graph)
    back = peft_fx.unmerge(merged)
    chosen = {"before": graph, "merged": merged, "back": back}.pop(edited)
    edit(chosen)
    assert not torch.equal(output(chosen, "mixed"), expected)
    for other in ({graph, merged, back} - {chosen}) | {peft_fx.unmerge(merged), peft_fx.merge(graph)}:
        torch.testing.assert_close(output(other, "mixed"), expected)
    torch.testing.assert_close(output(captured("mixed"), "mixed"), output(model_of("mixed"), "mixed"))


def test_unmerge_derives_anew_what_would_be_another_graph():
    graph = fresh()
    merged = peft_fx.merge(graph)
    for tensor in merged.peft_fx.adapters.buffers():
        tensor.requires_grad_(False)
    back = peft_fx.unmerge(merged)
    assert back._kept is not graph._kept and back.code == graph.code
    for name, parameter in back.peft_fx.adapters.named_parameters():
        (node,) = back.graph.find_nodes(op="get_attr", target=f"peft_fx.adapters.{name}")
        assert node.meta["val"].requires_grad == parameter.requires_grad is False


def test_a_merged_graph_that_was_moved_can_be_unmerged():
    back = peft_fx.unmerge(peft_fx.merge(fresh()).to("meta"))
    assert {t.device.type for t in bits(back).values()} == {"meta"} and output_shape(back) == (2, 6, 5)


def test_a_merge_that_changes_no_operator_runs_the_base_graph():
    merged = peft_fx.merge(fresh())
    assert merged._kept is state_of(merged).base.graph
    assert [(r.name, r.changed) for r in state_of(merged).reports] == [("PointAtFolded", 0), ("Inject", 0)]
    ungrouped = peft_fx.merge(fresh(TARGETS))
    assert [(r.name, r.changed) for r in state_of(ungrouped).reports] == [("PointAtFolded", 1), ("Inject", 0)]


def test_passes_without_work_are_reported():
    names, graph = [], fresh()
    with settings(on_report=lambda report, _: names.append(report.name)):
        peft_fx.merge(graph)
    assert names == ["PointAtFolded", "Inject"]


def test_a_graph_that_is_let_go_of_is_freed_at_once():
    gc.collect()
    gc.disable()
    try:
        graph = fresh()
        merged = peft_fx.merge(graph)
        back = peft_fx.unmerge(merged)
        output(merged, "mixed"), output(back, "mixed")
        gone = [weakref.ref(g) for g in (graph, merged, back)]
        del graph, merged, back
        assert [g() for g in gone] == [None] * 3
    finally:
        gc.enable()


# Memory ------------------------------------------------------------------------------------------------------------------

TENSORS = [torch.randn(3, 5), torch.randn(700, 300), torch.randn(2, 2, 2, dtype=torch.bfloat16), torch.empty(0, 4)]


def test_tensors_have_storages_of_their_own():
    room = Memory(TENSORS)
    found = [room.like(t).copy_(t) for t in TENSORS]
    for tensor, like in zip(found, TENSORS, strict=True):
        assert torch.equal(tensor, like) and tensor.dtype == like.dtype and tensor.is_contiguous()
        assert tensor.untyped_storage().nbytes() == like.nbytes
        file = io.BytesIO()
        torch.save(tensor, file)
        assert len(file.getvalue()) < like.nbytes + 4096


@pytest.mark.skipif(not hasattr(memory.mmap, "MADV_FREE"), reason="this system has no such mappings")
def test_a_mapping_is_used_again_once_nothing_reads_it():
    first = Memory(TENSORS)
    mapping, tensor = first.mapping, first.like(TENSORS[1]).fill_(1)
    del first
    assert Memory(TENSORS).mapping is not mapping and torch.equal(tensor, torch.ones(700, 300))
    del tensor
    assert memory.spare == [mapping] and Memory(TENSORS[:1]).mapping is mapping
    assert Memory([*TENSORS, *TENSORS]).mapping is not mapping


def test_a_system_without_huge_pages_and_mappings_is_served(monkeypatch):
    monkeypatch.delattr(memory.mmap, "MADV_FREE", raising=False)
    graph = fresh()
    merged = peft_fx.merge(graph)
    assert torch.equal(output(peft_fx.unmerge(merged), "mixed"), output(graph, "mixed"))


def test_slow_huge_pages_are_not_asked_for_again(monkeypatch):
    monkeypatch.setattr(memory, "SLOW", 0)
    room = Memory(TENSORS)
    assert torch.equal(room.like(TENSORS[1]).copy_(TENSORS[1]), TENSORS[1]) and not room.huge


def test_other_devices_get_torch_s_memory():
    room = Memory([TENSORS[0].to("meta")])
    assert room.buffer is None and room.like(TENSORS[0].to("meta")).is_meta
