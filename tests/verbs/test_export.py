"""`.pt2` files: programs by signature repair, and graphs that come back from them with their adapters."""

import copy
import io
import json
import os
import pickle
import zipfile

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
from peft_fx.errors import AdapterFileError, GraphError, MergeError
from peft_fx.store.state import state_of

# model, config, what it is there for
CASES = {
    "every kind": ("mixed", {"target_modules": ["embed", "conv", "turned", "plain", "head"]}),
    "bias where there is none": ("mixed", {"target_modules": ["plain", "head"], "lora_bias": True}),
    "modules to save": ("mixed", {"target_modules": ["plain"], "modules_to_save": ["head", "norm"]}),
    "biases": ("mixed", {"target_modules": ["turned"], "bias": "all"}),
    "token rows": ("mixed", {"target_modules": ["plain"], "trainable_token_indices": {"embed": [1, 7]}}),
    "dropout": ("mixed", {"target_modules": ["conv", "plain"], "lora_dropout": 0.3}),
    "llama": ("llama", {"target_modules": "all-linear"}),
    "tied token rows": ("tied_llama", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 1]}),
    "tied factors": ("tied_llama", {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}),
    "experts": ("mixtral", {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}),
}
SHAPES = ((2, 6), (3, 9))


def seeded(graph, name, *shape):
    torch.manual_seed(0)
    return output(graph, name, *shape)


def operators(graph):
    return [n.target for n in graph.nodes if n.op == "call_function"]


def two_adapters(name="mixed"):
    graph = tuned(captured(name), {"target_modules": ["plain", "conv"], "r": 4}, 1, "first")
    return tuned(graph, {"target_modules": ["plain", "embed"], "r": 2, "lora_alpha": 5}, 2, "second")


def there_and_back(graph, path):
    peft_fx.export(graph, path)
    return peft_fx.load(path)


@pytest.fixture(scope="module", params=quick(CASES, "llama"))
def case(request, tmp_path_factory):
    """(model's name, tuned graph, the graph loaded from its file), in eval mode."""
    name, config = CASES[request.param]
    graph = tuned(captured(name), {"r": 4, **config})
    return name, graph, there_and_back(graph, tmp_path_factory.mktemp("export") / "model.pt2")


# Programs ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_a_program_equals_the_graph_at_other_shapes_and_keeps_every_tag(case, training, tmp_path):
    name, graph, _ = case
    graph = copy.deepcopy(graph).train(training)  # batch norm counts on its own copy
    program = peft_fx.export(graph, tmp_path / "model.pt2")
    again = torch.export.load(tmp_path / "model.pt2")
    tags = [
        n.meta["custom"]["peft_fx"]
        for n in graph.graph.nodes
        if "peft_fx" in n.meta.get("custom", {}) and n.op == "call_function"
    ]
    assert tags
    for p in (program, again):
        kept = [
            n.meta["custom"]["peft_fx"]
            for n in p.graph.nodes
            if "peft_fx" in n.meta.get("custom", {}) and n.op == "call_function"
        ]
        assert kept == tags
        assert not any(n.op == "call_module" for n in p.graph.nodes)
        for shape in SHAPES:
            assert torch.equal(seeded(p.module(), name, *shape), seeded(graph, name, *shape))


def test_a_program_shares_the_tensors_of_its_graph(case):
    _, graph, _ = case
    program = peft_fx.export(graph)
    ours = dict(graph.named_parameters(remove_duplicate=False))
    assert all(program.state_dict[n].data_ptr() == p.data_ptr() for n, p in ours.items())


@pytest.mark.slow
@pytest.mark.parametrize("which", ["every kind", "modules to save", "tied factors"])
def test_a_program_can_be_decomposed(which):
    name, config = CASES[which]
    graph = tuned(captured(name), {"r": 4, **config})
    core = peft_fx.export(graph).run_decompositions()
    torch.testing.assert_close(output(core.module(), name), output(graph, name), rtol=1e-4, atol=1e-5)


def test_torch_export_can_trace_the_graph_again(case):
    name, graph, _ = case
    program = torch.export.export(graph, (), inputs(name))
    assert torch.equal(output(program.module(), name), output(graph, name))


def test_a_merged_program_is_the_model_s_own_operators_and_names(case):
    name, graph, _ = case
    merged = peft_fx.merge(graph)
    program = peft_fx.export(merged)
    own = set(model_and_graph(name)[0].state_dict())
    added = {"plain.bias"} if any(p.endswith("lora_B_bias") for p, _ in graph.named_parameters()) else set()
    assert set(program.state_dict) == own | added == set(merged.state_dict())
    assert torch.equal(output(program.module(), name), output(merged, name))
    assert operators(program.graph) == operators(peft_fx.export(captured(name)).graph)


def test_a_model_that_never_reads_a_parameter_keeps_it_in_its_program():
    class Unread(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x)

    model = Unread()
    program = peft_fx.export(peft_fx.capture(model, (torch.ones(2, 4),)))
    assert set(program.state_dict) == set(model.state_dict())
    assert torch.equal(program.module()(torch.ones(5, 4)), model(torch.ones(5, 4)))


def test_export_leaves_its_input_as_it_was(case):
    name, graph, _ = case
    before, outputs, code = bits(graph), output(graph, name), graph.code
    peft_fx.export(graph)
    assert same_bits(bits(graph), before) and graph.code == code and torch.equal(output(graph, name), outputs)


# Loaded graphs -----------------------------------------------------------------------------------------------------------


def test_a_loaded_graph_computes_the_same_bits(case):
    name, graph, loaded = case
    for shape in SHAPES:
        assert torch.equal(output(loaded, name, *shape), output(graph, name, *shape))


def test_a_loaded_graph_explains_the_same_targets(case):
    _, graph, loaded = case
    rows, again = (
        {
            (r.adapter, r.target, r.kind, r.status, r.lowering)
            for r in peft_fx.explain(g).rows
            if "num_batches" not in r.target
        }
        for g in (graph, loaded)  # a program in eval mode reads no counter
    )
    assert rows == again


def test_a_loaded_graph_without_its_adapters_is_the_model_bit_for_bit(case):
    name, _, loaded = case
    model = model_and_graph(name)[0]
    for shape in SHAPES:
        assert torch.equal(output(peft_fx.set_adapter(loaded, []), name, *shape), output(model, name, *shape))
        with peft_fx.disable_adapter(loaded):
            assert torch.equal(output(loaded, name, *shape), output(model, name, *shape))


def test_a_loaded_graph_s_base_is_the_captured_one_operator_by_operator(case):
    name, _, loaded = case
    assert operators(state_of(loaded).base.graph) == operators(peft_fx.export(captured(name)).graph)


def test_adapters_come_back_after_they_were_off(case):
    name, graph, loaded = case
    off = peft_fx.set_adapter(loaded, [])
    assert torch.equal(output(peft_fx.set_adapter(off, "default"), name), output(graph, name))


def test_a_loaded_graph_can_be_merged_and_unmerged(case):
    name, graph, loaded = case
    merged = peft_fx.merge(loaded)
    assert torch.equal(output(merged, name), output(peft_fx.merge(graph), name))
    assert torch.equal(output(peft_fx.unmerge(merged), name), output(graph, name))


def test_a_loaded_graph_saves_the_same_adapter_files(case, tmp_path):
    _, graph, loaded = case
    a, b = (peft_fx.save_adapter(g, tmp_path / str(i)) for i, g in enumerate((graph, loaded)))
    assert (a / "adapter_model.safetensors").read_bytes() == (b / "adapter_model.safetensors").read_bytes()
    assert (a / "adapter_config.json").read_bytes() == (b / "adapter_config.json").read_bytes()


def test_a_loaded_graph_can_be_swapped(case, tmp_path):
    name, graph, _ = case
    other = peft_fx.save_adapter(
        tuned(captured(name), state_of(graph).recipe["default"].config.to_dict(), 7), tmp_path / "other"
    )
    loaded = there_and_back(graph, tmp_path / "model.pt2")
    peft_fx.hotswap(loaded, other)
    torch.testing.assert_close(output(loaded, name), output(peft_fx.load_adapter(captured(name), other), name))


@pytest.mark.slow
def test_a_loaded_graph_is_exported_again_without_loss(case, tmp_path):
    name, graph, loaded = case
    again = there_and_back(loaded, tmp_path / "again.pt2")
    assert torch.equal(output(again, name), output(graph, name))
    assert same_bits(bits(again), bits(loaded))
    assert torch.equal(output(peft_fx.set_adapter(again, []), name), output(captured(name), name))


def test_a_loaded_graph_trains_its_adapters_only(case):
    name, graph, loaded = case
    loss_of(loaded, name).backward()
    loss_of(graph, name).backward()
    ours, theirs = gradients(loaded), gradients(graph)
    assert ours.keys() == theirs.keys() and all(n.startswith("peft_fx.adapters.") for n in ours)
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)
    for g in (graph, loaded):
        g.zero_grad()


def test_a_loaded_graph_has_one_mode_and_says_so(case):
    *_, loaded = case
    assert not loaded.training and loaded.eval() is loaded
    with pytest.raises(GraphError, match="no train mode.*holds one mode"):
        loaded.train()


def test_two_active_adapters_come_back_each_on_its_own(tmp_path):
    graph = two_adapters()
    loaded = there_and_back(graph, tmp_path / "model.pt2")
    assert state_of(loaded).active == ("first", "second")
    for active in (["first", "second"], ["first"], ["second"], []):
        assert torch.equal(
            output(peft_fx.set_adapter(loaded, active), "mixed"), output(peft_fx.set_adapter(graph, active), "mixed")
        )
    assert torch.equal(
        output(peft_fx.delete_adapter(loaded, "first"), "mixed"), output(peft_fx.set_adapter(graph, "second"), "mixed")
    )


class ReadTwice(torch.nn.Module):
    """A weight that only the weight form can adapt, with and without a bias of its own."""

    def __init__(self, bias):
        super().__init__()
        self.lin = torch.nn.Linear(8, 8, bias=bias)

    def forward(self, x):
        return self.lin(x) + self.lin.weight.sum(0)


@pytest.mark.parametrize("bias", [False, True])
def test_two_adapters_that_rewrite_weight_and_bias_come_back_each_on_its_own(bias, tmp_path):
    x, model = torch.randn(3, 8), ReadTwice(bias)
    graph = peft_fx.capture(model, (x,))
    for i, name in enumerate(("first", "second")):
        graph = tuned(graph, {"r": 2, "target_modules": ["lin"], "lora_bias": True}, i, name)
    loaded = there_and_back(graph, tmp_path / "model.pt2")
    for active in (["first", "second"], ["first"], ["second"], []):
        assert torch.equal(peft_fx.set_adapter(loaded, active)(x), peft_fx.set_adapter(graph, active)(x))
    assert torch.equal(peft_fx.set_adapter(loaded, [])(x), model(x))
    torch.testing.assert_close(peft_fx.merge(loaded)(x), graph(x))


def test_resident_adapters_that_are_not_active_stay_behind(tmp_path):
    loaded = there_and_back(peft_fx.set_adapter(two_adapters(), "second"), tmp_path / "model.pt2")
    assert list(state_of(loaded).recipe) == ["second"]
    assert not any(".first." in name for name in bits(loaded))


def test_tied_embeddings_are_tied_again(tmp_path):
    graph = tuned(captured("tied_llama"), {"target_modules": ["q_proj"]})
    loaded = there_and_back(graph, tmp_path / "model.pt2")
    assert loaded.get_parameter("lm_head.weight") is loaded.get_parameter("model.embed_tokens.weight")
    assert state_of(loaded).table.tied == state_of(graph).table.tied


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_batch_norm_counts_in_training_only_after_loading_too(training, tmp_path):
    graph = copy.deepcopy(tuned(captured("mixed"), {"target_modules": ["plain"]})).train(training)
    graph = there_and_back(graph, tmp_path / "model.pt2")
    before = graph.get_buffer("norm.num_batches_tracked").item()
    mean = graph.get_buffer("norm.running_mean").clone()
    output(graph, "mixed")
    assert graph.get_buffer("norm.num_batches_tracked").item() == before + training
    assert torch.equal(graph.get_buffer("norm.running_mean"), mean) is not training


def test_a_base_graph_without_adapters_comes_back_trainable(tmp_path):
    model, graph = model_and_graph("mixed")
    loaded = there_and_back(graph, tmp_path / "model.pt2")
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {n for n, _ in model.named_parameters()}
    new = tuned(loaded, {"target_modules": ["plain", "conv"]})
    assert torch.equal(output(new, "mixed"), output(tuned(graph, {"target_modules": ["plain", "conv"]}), "mixed"))


def test_a_program_of_another_origin_is_read_without_adapters(tmp_path):
    model = model_of("mixed")
    torch.export.save(torch.export.export(model, (), inputs("mixed")), tmp_path / "plain.pt2")
    loaded = peft_fx.load(tmp_path / "plain.pt2")
    assert torch.equal(output(loaded, "mixed"), output(model, "mixed"))
    peft_fx.apply(loaded, {"peft_type": "LORA", "target_modules": ["plain"]})


# Merged files ------------------------------------------------------------------------------------------------------------


def test_a_loaded_merged_graph_cannot_be_unmerged_and_says_why(case, tmp_path):
    name, graph, _ = case
    merged = peft_fx.merge(graph)
    loaded = there_and_back(merged, tmp_path / "model.pt2")
    assert torch.equal(output(loaded, name, 3, 9), output(merged, name, 3, 9))
    assert {r.status for r in peft_fx.explain(loaded).rows} == {"merged"}
    with pytest.raises(MergeError, match="not kept.*loaded from a file"):
        peft_fx.unmerge(loaded)
    with pytest.raises(GraphError, match="merged graph"):
        peft_fx.set_adapter(loaded, "default")


def test_what_a_merge_left_active_is_still_swapped_after_loading(tmp_path):
    merged = peft_fx.merge(two_adapters(), "first")
    loaded = there_and_back(merged, tmp_path / "model.pt2")
    assert torch.equal(output(loaded, "mixed"), output(merged, "mixed"))
    folder = folder_of(tmp_path / "a", captured("mixed"), {"target_modules": ["plain", "embed"], "r": 2}, 9)
    peft_fx.hotswap(loaded, folder, "second")
    peft_fx.hotswap(merged, folder, "second")
    assert torch.equal(output(loaded, "mixed"), output(merged, "mixed"))


# Files -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failing", ["torch.export.save", "os.replace"])
def test_a_failing_write_leaves_the_old_file_and_nothing_else(failing, tmp_path, monkeypatch):
    graph = tuned(captured("mixed"), {"target_modules": ["plain"]})
    peft_fx.export(graph, tmp_path / "model.pt2")
    old = (tmp_path / "model.pt2").read_bytes()

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(failing, fail)
    with pytest.raises(AdapterFileError, match="disk full"):
        peft_fx.export(graph, tmp_path / "model.pt2")
    monkeypatch.undo()
    assert (tmp_path / "model.pt2").read_bytes() == old and os.listdir(tmp_path) == ["model.pt2"]


def test_a_path_that_cannot_be_written_is_refused(tmp_path):
    graph = captured("mixed")
    for path in (tmp_path, tmp_path / "nowhere" / "model.pt2"):
        with pytest.raises(AdapterFileError, match="expected a file path"):
            peft_fx.export(graph, path)


def edited(data, change):
    """The zip file `data` with change(name, content) in each file's place; None drops it."""
    new = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(new, "w") as out:
        for name in old.namelist():
            if (content := change(name, old.read(name))) is not None:
                out.writestr(name, content)
    return new.getvalue()


def edited_json(change):
    return lambda data: edited(data, lambda n, c: change(c) if n.endswith("peft_fx.json") else c)


def with_entry(**entries):
    return edited_json(lambda c: json.dumps({**json.loads(c), **entries}))


def without_entry(entry):
    return edited_json(lambda c: json.dumps({k: v for k, v in json.loads(c).items() if k != entry}))


def saved_tensors(data):
    file = io.BytesIO()
    torch.save({"a": torch.ones(2)}, file)
    return file.getvalue()


DAMAGES = {
    "empty": lambda data: b"",
    "noise": lambda data: b"\xff" * 500,
    "cut off": lambda data: data[:-300],
    "a pickle": lambda data: pickle.dumps({}),
    "saved tensors": saved_tensors,
    "no model": lambda data: edited(data, lambda n, c: None if "/models/" in n else c),
    "no weights": lambda data: edited(data, lambda n, c: None if "/weights/" in n else c),
    "a model of noise": lambda data: edited(data, lambda n, c: b"{}" if n.endswith("models/model.json") else c),
    "compiled code": lambda data: with_compiled_code(data),
    "json cut off": edited_json(lambda c: c[:20]),
    "json of another shape": edited_json(lambda c: "[]"),
    "another format": with_entry(format=99),
    "a table of another shape": with_entry(table={"records": 3}),
    "a method that does not exist": with_entry(recipe={"default": {"peft_type": "NOPE"}}),
    "an active adapter that is not there": with_entry(active=["other"]),
    **{f"no {entry}": without_entry(entry) for entry in ("format", "training", "table", "recipe", "active", "merged", "merge_report")},
}  # fmt: skip


def with_compiled_code(data):
    root = zipfile.ZipFile(io.BytesIO(data)).namelist()[0].partition("/")[0]
    new = io.BytesIO(data)
    with zipfile.ZipFile(new, "a") as out:
        out.writestr(f"{root}/data/aotinductor/model/model.so", b"")
    return new.getvalue()


@pytest.fixture(scope="module")
def sound_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("sound") / "model.pt2"
    peft_fx.export(tuned(captured("mixed"), {"target_modules": ["plain"]}), path)
    return path.read_bytes()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_gives_one_clear_error(damage, sound_file, tmp_path):
    path = tmp_path / "bad.pt2"
    path.write_bytes(DAMAGES[damage](sound_file))
    with pytest.raises(AdapterFileError, match="bad.pt2: "):
        peft_fx.load(path)


def test_a_missing_file_is_named():
    with pytest.raises(AdapterFileError, match="nowhere.pt2: no such file"):
        peft_fx.load("nowhere.pt2")
