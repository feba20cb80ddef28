"""Verbs return new graphs and leave their input usable; what a graph carries survives copying, or refuses loudly."""

import copy
import io
import pickle

import peft
import pytest
import torch
from graphs import (
    bits,
    captured,
    folder_of,
    gradients,
    inputs,
    loss_of,
    model_and_graph,
    model_of,
    output,
    same_bits,
    tuned,
)
from marks import quick

import peft_fx
from peft_fx.errors import GraphError, MergeError, RecipeError
from peft_fx.store.state import state_of

TARGETS = {"mixed": ["embed", "conv", "plain"], "llama": ["q_proj", "down_proj"]}


def one(name="mixed"):
    return tuned(captured(name), {"target_modules": TARGETS[name], "r": 4}, 1)


def two(name="mixed"):
    """Two adapters, both active."""
    return tuned(one(name), {"target_modules": TARGETS[name], "r": 2, "lora_alpha": 5}, 2, "second")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return folder_of(
        tmp_path_factory.mktemp("state") / "a", captured("mixed"), {"target_modules": TARGETS["mixed"], "r": 4}, 3
    )


# verb -> (what it is given, what it does)
VERBS = {
    "apply": (two, lambda g, _: peft_fx.apply(g, {"peft_type": "LORA", "r": 2, "target_modules": ["head"]}, "third")),
    "load_adapter": (two, lambda g, f: peft_fx.load_adapter(g, f, "third")),
    "set_adapter": (two, lambda g, _: peft_fx.set_adapter(g, "second")),
    "delete_adapter": (two, lambda g, _: peft_fx.delete_adapter(g, "second")),
    "prepare_hotswap": (two, lambda g, _: peft_fx.prepare_hotswap(g, max_rank=8)),
    "merge": (two, lambda g, _: peft_fx.merge(g)),
    "merge one": (two, lambda g, _: peft_fx.merge(g, "second")),
    "merge, kept on the CPU": (two, lambda g, _: peft_fx.merge(g, keep_base="cpu")),
    "merge, dropped": (two, lambda g, _: peft_fx.merge(g, keep_base=None)),
    "unmerge": (lambda: peft_fx.merge(two()), lambda g, _: peft_fx.unmerge(g)),
    "unmerge one": (lambda: peft_fx.merge(two(), "second"), lambda g, _: peft_fx.unmerge(g)),
    "export": (two, lambda g, _: peft_fx.export(g).module()),
    "deepcopy": (two, lambda g, _: copy.deepcopy(g)),
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_returns_a_new_graph_and_leaves_its_input_as_it_was(verb, folder):
    make, act = VERBS[verb]
    graph = make()
    before, outputs, code, state = bits(graph), output(graph, "mixed"), graph.code, state_of(graph)
    trains = {n: p.requires_grad for n, p in graph.named_parameters()}
    new = act(graph, folder)
    assert isinstance(new, torch.fx.GraphModule) and new is not graph
    assert same_bits(bits(graph), before) and torch.equal(output(graph, "mixed"), outputs) and graph.code == code
    assert state_of(graph) is state and {n: p.requires_grad for n, p in graph.named_parameters()} == trains
    if verb != "export":
        graph.train()
        assert not new.training
        graph.eval()


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_acts_on_a_deep_copy_as_on_the_original(verb, folder):
    make, act = VERBS[verb]
    torch.manual_seed(0)
    graph = make()
    twin = copy.deepcopy(graph)
    torch.manual_seed(5)
    expected = output(act(graph, folder), "mixed")
    torch.manual_seed(5)
    assert torch.equal(output(act(twin, folder), "mixed"), expected)


@pytest.mark.parametrize("name", TARGETS)
def test_the_base_is_shared_and_the_user_s_model_keeps_its_requires_grad(name):
    model, graph = model_and_graph(name)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    new = peft_fx.merge(peft_fx.set_adapter(two(name), "second"), keep_base=None)
    adapted = two(name)
    for n, p in model.named_parameters():
        assert adapted.get_parameter(n).data_ptr() == graph.get_parameter(n).data_ptr() == p.data_ptr()
        assert not adapted.get_parameter(n).requires_grad and graph.get_parameter(n) is p
        is_target = any(n == r.target for r in peft_fx.explain(adapted).rows)
        assert (new.get_parameter(n).data_ptr() == p.data_ptr()) is not is_target
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags and all(flags.values())


def test_graphs_derived_from_one_another_share_their_adapters():
    graph = two()
    other = peft_fx.set_adapter(graph, "second")
    for name, parameter in graph.named_parameters():
        if name.startswith("peft_fx."):
            assert other.get_parameter(name) is parameter


# Which adapters act ------------------------------------------------------------------------------------------------------


def test_several_active_adapters_add_up():
    model = torch.nn.Sequential(torch.nn.Linear(4, 6))
    x = torch.randn(3, 4)
    config = {"peft_type": "LORA", "target_modules": ["0"], "init_lora_weights": False}
    graph = peft_fx.capture(model, (x,))
    for i, name in enumerate(("a", "b", "c")):
        graph = peft_fx.apply(graph, {**config, "r": i + 1}, name)
    off = peft_fx.set_adapter(graph, [])(x)
    assert torch.equal(off, model(x))
    parts = [peft_fx.set_adapter(graph, n)(x) - off for n in "abc"]
    for names in (["a", "b", "c"], ["c", "a"], ["b"]):
        both = peft_fx.set_adapter(graph, names)
        torch.testing.assert_close(both(x), off + sum(parts["abc".index(n)] for n in names))
        assert state_of(both).active == tuple(names)
    torch.testing.assert_close(graph(x), off + sum(parts))


def test_set_adapter_none_is_the_model_bit_for_bit():
    assert torch.equal(output(peft_fx.set_adapter(two(), []), "mixed"), output(captured("mixed"), "mixed"))


def test_the_second_adapter_loaded_waits_until_it_is_set(folder):
    first = peft_fx.load_adapter(captured("mixed"), folder, "a")
    both = peft_fx.load_adapter(first, folder, "b")
    assert state_of(both).active == ("a",) and list(state_of(both).recipe) == ["a", "b"]
    assert torch.equal(output(both, "mixed"), output(first, "mixed"))
    assert not any(p.requires_grad for p in both.parameters())


def test_delete_adapter_removes_its_tensors_from_the_result_only():
    graph = two()
    new = peft_fx.delete_adapter(graph, "default")
    assert not any(".default." in n for n in new.state_dict()) and any(".default." in n for n in graph.state_dict())
    assert torch.equal(output(new, "mixed"), output(peft_fx.set_adapter(graph, "second"), "mixed"))
    empty = peft_fx.delete_adapter(new, "second")
    assert torch.equal(output(empty, "mixed"), output(captured("mixed"), "mixed"))
    peft_fx.apply(empty, {"peft_type": "LORA", "target_modules": ["plain"]})


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_disable_adapter_is_the_model_inside_the_block_and_the_adapters_after_it(compiled):
    graph, base = one(), captured("mixed")
    torch._dynamo.reset()
    run = torch.compile(graph, backend="eager", fullgraph=True) if compiled else graph
    before = output(run, "mixed")
    for _ in range(2):
        with peft_fx.disable_adapter(graph) as inside:
            assert inside is graph
            assert torch.equal(output(run, "mixed"), output(base, "mixed"))
            with peft_fx.disable_adapter(graph):
                assert torch.equal(output(run, "mixed"), output(base, "mixed"))
        assert torch.equal(output(run, "mixed"), before)
    with pytest.raises(ZeroDivisionError), peft_fx.disable_adapter(graph):
        1 / 0  # noqa: B018
    assert torch.equal(output(run, "mixed"), before)


REFUSALS = {
    "an unknown name": (lambda g: peft_fx.set_adapter(g, "nobody"), GraphError, "no adapter 'nobody'; resident: default, second"),
    "an unknown name to delete": (lambda g: peft_fx.delete_adapter(g, "nobody"), GraphError, "no adapter 'nobody'"),
    "an unknown name to merge": (lambda g: peft_fx.merge(g, "nobody"), GraphError, "no adapter 'nobody'"),
    "an unknown name to save": (lambda g: peft_fx.save_adapter(g, "/nowhere", "nobody"), GraphError, "no adapter 'nobody'"),
    "no name to save among two": (lambda g: peft_fx.save_adapter(g, "/nowhere"), RecipeError, "which adapter.*default, second"),
    "a name twice": (lambda g: peft_fx.set_adapter(g, ["second", "second"]), GraphError, "repeated"),
    "a name in use": (lambda g: peft_fx.apply(g, {"peft_type": "LORA", "target_modules": ["plain"]}, "second"), RecipeError, "already.*hotswap"),
    "a name with a dot": (lambda g: peft_fx.apply(g, {"peft_type": "LORA", "target_modules": ["plain"]}, "a.b"), RecipeError, "dot"),
    "nothing to unmerge": (peft_fx.unmerge, MergeError, "nothing to unmerge"),
    "nothing to merge": (lambda g: peft_fx.merge(peft_fx.set_adapter(g, [])), MergeError, "no adapter is active"),
    "an unknown place for the base": (lambda g: peft_fx.merge(g, keep_base="disk"), MergeError, "expected one of"),
    "a plain module": (lambda g: peft_fx.set_adapter(torch.nn.Linear(2, 2), "a"), GraphError, "peft_fx.capture"),
    "a graph of torch.fx": (lambda g: peft_fx.apply(torch.fx.symbolic_trace(torch.nn.Linear(2, 2)), {"peft_type": "LORA"}), GraphError, "peft_fx.capture"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_a_mistake_is_refused_with_what_there_is(case):
    act, error, match = REFUSALS[case]
    graph = two()
    before = bits(graph)
    with pytest.raises(error, match=match):
        act(graph)
    assert same_bits(bits(graph), before) and state_of(graph).active == ("default", "second")


# Merge -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_base", ["device", "cpu"])
@pytest.mark.parametrize("names", [None, "second", ["second", "default"]], ids=str)
@pytest.mark.parametrize("copied", [False, True], ids=["", "deepcopied"])
def test_unmerge_brings_every_bit_back(keep_base, names, copied):
    graph = two()
    merged = peft_fx.merge(graph, names, keep_base=keep_base)
    if copied:
        merged = copy.deepcopy(merged)
    torch.testing.assert_close(output(merged, "mixed"), output(graph, "mixed"), rtol=1e-4, atol=1e-5)
    back = peft_fx.unmerge(merged)
    assert same_bits(bits(back), bits(graph)) and back.state_dict().keys() == graph.state_dict().keys()
    assert (
        torch.equal(output(back, "mixed"), output(graph, "mixed")) and state_of(back).active == state_of(graph).active
    )
    assert {n: p.requires_grad for n, p in back.named_parameters()} == {
        n: p.requires_grad for n, p in graph.named_parameters()
    }


def test_dropped_weights_cannot_be_unmerged():
    with pytest.raises(MergeError, match="keep_base"):
        peft_fx.unmerge(peft_fx.merge(two(), keep_base=None))


MERGED_REFUSALS = {
    "merge": (peft_fx.merge, MergeError),
    "apply": (lambda g: peft_fx.apply(g, {"peft_type": "LORA", "target_modules": ["head"]}, "third"), GraphError),
    "set_adapter": (lambda g: peft_fx.set_adapter(g, "second"), GraphError),
    "delete_adapter": (lambda g: peft_fx.delete_adapter(g, "second"), GraphError),
    "disable_adapter": (lambda g: peft_fx.disable_adapter(g).__enter__(), GraphError),
    "prepare_hotswap": (lambda g: peft_fx.prepare_hotswap(g, max_rank=8), GraphError),
}


@pytest.mark.parametrize("verb", MERGED_REFUSALS)
@pytest.mark.parametrize("names", [None, "second"], ids=str)
def test_a_merged_graph_refuses_with_the_remedy(verb, names):
    act, error = MERGED_REFUSALS[verb]
    merged = peft_fx.merge(two(), names)
    before = output(merged, "mixed")
    with pytest.raises(error, match="unmerge"):
        act(merged)
    assert torch.equal(output(merged, "mixed"), before)


# What a graph carries ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make", [one, two, lambda: peft_fx.merge(two()), lambda: captured("mixed")], ids=["one", "two", "merged", "base"]
)
def test_a_deep_copy_is_complete_and_independent(make):
    graph = make()
    twin = copy.deepcopy(graph)
    assert same_bits(bits(twin), bits(graph)) and list(twin.state_dict()) == list(graph.state_dict())
    assert {n: p.requires_grad for n, p in twin.named_parameters()} == {
        n: p.requires_grad for n, p in graph.named_parameters()
    }
    assert torch.equal(output(twin, "mixed"), output(graph, "mixed"))
    before = output(graph, "mixed")
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert torch.equal(output(graph, "mixed"), before)
    assert state_of(twin).recipe == state_of(graph).recipe and all(
        state_of(twin).recipe[n] is not r for n, r in state_of(graph).recipe.items()
    )


def test_a_swap_in_a_deep_copy_is_not_seen_by_the_original(folder):
    graph = one()
    twin, before = copy.deepcopy(graph), bits(graph)
    peft_fx.hotswap(twin, folder)
    assert same_bits(bits(graph), before) and torch.equal(
        output(twin, "mixed"), output(peft_fx.load_adapter(captured("mixed"), folder), "mixed")
    )


def test_the_state_dict_of_one_graph_fits_another():
    source, sink = two(), tuned(captured("mixed"), {"target_modules": TARGETS["mixed"], "r": 4}, 8)
    sink = copy.deepcopy(tuned(sink, {"target_modules": TARGETS["mixed"], "r": 2, "lora_alpha": 5}, 9, "second"))
    assert not torch.equal(output(sink, "mixed"), output(source, "mixed"))
    assert not any(sink.load_state_dict(source.state_dict()))
    assert torch.equal(output(sink, "mixed"), output(source, "mixed"))


def test_the_state_dict_has_the_model_s_names_and_the_adapters():
    model, graph = model_and_graph("mixed")
    assert set(graph.state_dict()) == set(model.state_dict()) == set(peft_fx.merge(two()).state_dict())
    assert {n for n in two().state_dict() if not n.startswith("peft_fx.adapters.")} == set(model.state_dict())


def test_a_tie_is_kept_by_every_verb():
    graph = tuned(captured("tied_llama"), {"target_modules": ["q_proj"]})
    for g in (
        graph,
        copy.deepcopy(graph),
        peft_fx.merge(graph),
        peft_fx.unmerge(peft_fx.merge(graph)),
        peft_fx.prepare_hotswap(graph, max_rank=16),
    ):
        assert g.get_parameter("lm_head.weight") is g.get_parameter("model.embed_tokens.weight")


@pytest.mark.parametrize("dump", [lambda g: torch.save(g, io.BytesIO()), pickle.dumps], ids=["torch.save", "pickle"])
def test_pickling_is_refused_with_the_remedy(dump):
    for graph in (one(), captured("mixed"), peft_fx.merge(one())):
        with pytest.raises(GraphError, match="peft_fx.export"):
            dump(graph)


CASTS = {"bfloat16": lambda g: g.to(torch.bfloat16), "half": lambda g: g.half(), "double": lambda g: g.double()}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("copies", [0, 1, 2])
def test_a_cast_is_refused_and_converts_nothing(cast, copies):
    for graph in (
        two(),
        captured("mixed"),
        peft_fx.merge(two()),
        tuned(captured("llama"), {"target_modules": ["q_proj"]}),
    ):
        for _ in range(copies):
            graph = copy.deepcopy(graph)
        before = bits(graph)
        with pytest.raises(GraphError, match="capture it again"):
            CASTS[cast](graph)
        assert same_bits(bits(graph), before)


@pytest.mark.parametrize("name", TARGETS)
def test_a_graph_moves_to_another_device_with_its_literals(name):
    for graph in (two(name), peft_fx.merge(two(name)), captured(name)):
        moved = copy.deepcopy(graph).to("meta")
        assert {t.device.type for t in (*moved.parameters(), *moved.buffers())} == {"meta"}
        result = moved(**{k: v.to("meta") for k, v in inputs(name).items()})
        assert (result if name == "mixed" else result.logits).device.type == "meta"


# Compiling and training --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", TARGETS)
def test_one_full_graph_is_compiled_in_either_mode(name, training):
    graph = copy.deepcopy(two(name)).train(training)
    torch._dynamo.reset()
    run = torch.compile(graph, backend="aot_eager", fullgraph=True)
    twin = copy.deepcopy(graph)
    seen = []
    for g in (run, twin):
        torch.manual_seed(0)  # of the dropout
        seen.append(output(g, name))
        loss_of(g, name).backward()
    torch.testing.assert_close(*seen, rtol=1e-4, atol=1e-5)
    for n, gradient in gradients(twin).items():
        torch.testing.assert_close(graph.get_parameter(n).grad, gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", TARGETS)
def test_training_lowers_the_loss_through_adapters_alone(name):
    graph = copy.deepcopy(two(name)).train()
    frozen = {n: p.detach().clone() for n, p in graph.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in graph.parameters() if p.requires_grad], lr=3e-2)
    losses = []
    for _ in range(15):
        loss = loss_of(graph, name)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    trained = {n for n, p in graph.named_parameters() if p.requires_grad}
    assert set(gradients(graph)) == trained and all(n.startswith("peft_fx.adapters.") for n in trained)
    assert all(torch.equal(graph.get_parameter(n), p) for n, p in frozen.items())


PEFT_COUNTS = {
    "llama": {"target_modules": "all-linear", "r": 3},
    "biased_llama": {"target_modules": ["q_proj"], "lora_bias": True, "modules_to_save": ["lm_head"]},
    "tied_llama": {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]},
    "gpt2": {"target_modules": ["c_attn"], "bias": "lora_only"},
}


@pytest.mark.parametrize("name", quick(PEFT_COUNTS, "tied_llama"))
def test_trainable_parameters_are_counted_as_peft_counts_them(name):
    config = PEFT_COUNTS[name]
    theirs = peft.get_peft_model(model_of(name), peft.LoraConfig(**config)).get_nb_trainable_parameters()
    ours = peft_fx.trainable_parameters(peft_fx.apply(captured(name), {"peft_type": "LORA", **config}))
    assert ours.trainable == theirs[0]
    # PEFT counts its second copy of what it replaces
    assert str(ours).startswith(f"trainable params: {theirs[0]:,} || all params: ")
