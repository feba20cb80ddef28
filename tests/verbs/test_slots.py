"""Slots of a reserved graph: they have the names of what is in them, become free again, and nothing is recompiled."""

import conformance as c
import pytest
import torch
from test_switch import LAYER, LORA, adapter, pair

import peft_fx as fx


@pytest.fixture
def reserved(tmp_path):
    """(graph with a and b in slots of their own and c in a third, folder of adapters, outputs of each alone)"""
    both, alone, base = pair("wide", LORA, tmp_path)
    alone |= {None: base, "c": adapter("wide", LORA, 9, tmp_path / "c")}
    graph = fx.reserve(both, slots=3)
    fx.hotswap(graph, tmp_path / "c", "c")
    return graph, tmp_path, alone


def names(graph):
    return [slot.name for slot in fx.slots(graph)]


def outputs_are(graph, expected):
    return c.error(c.run(graph, "wide"), expected) <= 1e-6


def test_everything_speaks_of_what_is_in_a_slot(reserved):
    graph, folder, alone = reserved
    assert [(s.slot, s.name, s.max_rank, s.weight) for s in fx.slots(graph)] == [
        ("a", "a", 2, 1.0), ("b", "b", 2, 0.0), ("slot0", "c", 2, 0.0),
    ]  # fmt: skip
    assert fx.switch(graph, ["c", "b"], weights=[1, 0.5]) == {"a": 1.0}
    assert fx.switch(graph, "c") == {"c": 1.0, "b": 0.5}
    rows = {(row.adapter, row.status) for row in fx.explain(graph).rows}
    assert rows == {("a", "resident"), ("b", "resident"), ("c", "active")}
    with pytest.raises(fx.RecipeError, match="one of: a, b, c"):
        fx.save_adapter(graph, folder / "out")
    with pytest.raises(fx.GraphError, match=r"release on a merged graph \(c\): unmerge"):
        fx.release(fx.merge(graph), "c")
    fx.export(graph, folder / "graph.pt2")
    loaded = fx.load(folder / "graph.pt2")
    assert fx.slots(loaded) == fx.slots(graph) and fx.switch(loaded, None) == {"c": 1.0}
    fx.release(loaded, "c")
    assert names(loaded) == ["a", "b", None] and outputs_are(loaded, alone[None])
    mixed = fx.mixed_batch(graph)
    x = c.inputs("wide")["x"]
    with pytest.raises(fx.GraphError, match="0: a, 1: b, 2: c"):
        mixed(x, adapter_ids=torch.full((len(x),), 7))


def test_a_swap_under_another_name_renames_the_slot_in_all_graphs_over_it(reserved):
    graph, folder, _ = reserved
    mixed = fx.mixed_batch(graph, ["a"])
    fx.release(graph, "b")
    fx.hotswap(graph, folder / "b", "new")
    assert names(graph) == names(mixed) == ["a", "new", "c"]
    wide = fx.prepare_hotswap(graph, max_rank=4)  # has tensors, and so names, of its own
    fx.rename(graph, "new", "other")
    assert names(wide) == ["a", "new", "c"] and [s.max_rank for s in fx.slots(wide)] == [4, 4, 4]


@pytest.mark.parametrize("config", [LORA, {**LORA, "use_dora": True}, {"peft_type": "OFT", "oft_block_size": 4, **LAYER}],
                         ids=["LORA", "DORA", "OFT"])  # fmt: skip
def test_released_slots_are_filled_again_in_a_compiled_graph_without_recompiling(config, tmp_path):
    both, alone, base = pair("wide", config, tmp_path)
    compiled = torch.compile(fx.reserve(both, slots=2), fullgraph=True, backend="aot_eager")
    c.run(compiled, "wide")
    with torch.compiler.set_stance("fail_on_recompile"):
        drawn = torch.get_rng_state()
        fx.release(compiled, "a")
        assert torch.equal(torch.get_rng_state(), drawn) and names(compiled) == [None, "b"]
        assert outputs_are(compiled, base)
        fx.hotswap(compiled, tmp_path / "a", "again")
        assert names(compiled) == ["again", "b"] and outputs_are(compiled, base)
        fx.switch(compiled, "again")
        assert outputs_are(compiled, alone["a"])
        fx.switch(compiled, "b")
        fx.rename(compiled, "b", "best")
        assert names(compiled) == ["again", "best"] and outputs_are(compiled, alone["b"])


def test_a_released_slot_has_the_room_that_it_was_reserved_with(tmp_path):
    both, alone, _ = pair("wide", LORA, tmp_path)
    graph = fx.reserve(both, slots=2, max_rank=6)
    for rank in (1, 6):
        expected = adapter("wide", {**LORA, "r": rank}, rank, tmp_path / str(rank))
        fx.release(graph, names(graph)[0])
        assert fx.slots(graph)[0][1:4] == (None, "LORA", 6)
        fx.hotswap(graph, tmp_path / str(rank), f"rank {rank}")
        fx.switch(graph, f"rank {rank}")
        assert outputs_are(graph, expected)
    assert outputs_are(both, alone["a"])  # the graph that it was made from has numbers of its own


def test_delete_adapter_frees_a_slot_of_the_result_alone(reserved):
    graph, folder, alone = reserved
    fx.switch(graph, "a")
    without = fx.delete_adapter(graph, "a")
    assert names(without) == [None, "b", "c"] and outputs_are(without, alone[None])
    assert names(graph) == ["a", "b", "c"] and outputs_are(graph, alone["a"])
    with pytest.raises(fx.GraphError, match="there is no adapter 'a'; resident: b, c"):
        fx.switch(without, "a")
    fx.hotswap(without, folder / "c", "new")
    fx.switch(without, "new")
    assert outputs_are(without, alone["c"]) and names(graph) == ["a", "b", "c"]
    fx.switch(without, "b")  # what both hold, both switch
    assert fx.slots(graph)[1].weight == 1.0


def empty(graph):
    for name in names(graph):
        fx.release(graph, name)
    return graph


REFUSED = {
    "switch: a name that is gone": (lambda g, f: fx.release(g, "a") or fx.switch(g, "a"), "no adapter 'a'; resident: b, c"),
    "switch: none is left": (lambda g, f: fx.switch(empty(g), "a"), "no adapter 'a'; resident: none"),
    "switch: a slot's own name": (lambda g, f: fx.switch(g, "slot0"), "no adapter 'slot0'; resident: a, b, c"),
    "release: a name that is gone": (lambda g, f: fx.release(g, "x"), "no adapter 'x'; resident: a, b, c"),
    "delete: a name that is gone": (lambda g, f: fx.delete_adapter(g, "x"), "no adapter 'x'; resident: a, b, c"),
    "save: a name that is gone": (lambda g, f: fx.save_adapter(g, f / "x", "slot0"), "no adapter 'slot0'; resident: a, b, c"),
    "mixed: a name that is gone": (lambda g, f: fx.mixed_batch(g, ["x"]), "no adapter 'x'; resident: a, b, c"),
    "rename: a name that is gone": (lambda g, f: fx.rename(g, "x", "y"), "no adapter 'x'; resident: a, b, c"),
    "rename: a name that is taken": (lambda g, f: fx.rename(g, "a", "b"), "there is an adapter 'b' already"),
    "rename: no name": (lambda g, f: fx.rename(g, "a", ""), "expected a non-empty string"),
    "swap: no slot is free": (lambda g, f: fx.hotswap(g, f / "a", "d"), r"taken: a, b, c. Free one with peft_fx.release"),
    "apply": (lambda g, f: fx.apply(g, LORA, "d"), r"peft_fx.hotswap\(graph, path, name\) puts one into a free slot"),
    "load_adapter": (lambda g, f: fx.load_adapter(g, f / "a", "d"), "puts one into a free slot"),
    "set_adapter": (lambda g, f: fx.set_adapter(g, "a"), r"peft_fx.switch\(graph, names\) writes it"),
    "reserve": (lambda g, f: fx.reserve(g, slots=9), "it has slots already"),
}  # fmt: skip


@pytest.mark.parametrize("misuse, message", REFUSED.values(), ids=REFUSED)
def test_a_refusal_says_what_is_resident_and_what_to_do(misuse, message, reserved):
    graph, folder, _ = reserved
    with pytest.raises(fx.PeftFxError, match=message):
        misuse(graph, folder)


@pytest.mark.parametrize("verb", [fx.slots, lambda g: fx.release(g, "a"), lambda g: fx.rename(g, "a", "b")])
def test_a_graph_without_slots_says_how_to_get_some(verb, tmp_path):
    both, _, _ = pair("wide", LORA, tmp_path)
    with pytest.raises(fx.GraphError, match="this graph has no slots: make one with peft_fx.reserve"):
        verb(both)


def test_a_prepared_swap_is_refused_when_its_slot_was_taken_meanwhile(reserved):
    graph, folder, alone = reserved
    fx.release(graph, "c")
    first, second = (fx.prepare_swap(graph, folder / name, f"new {name}") for name in "ab")
    fx.hotswap(graph, first)
    with pytest.raises(fx.HotswapError, match="holds 'new a' now, resident: a, b, new a; prepare it again"):
        fx.hotswap(graph, second)
    fx.switch(graph, "new a")
    assert outputs_are(graph, alone["a"])
