"""Graphs cut into equal blocks, each class compiled once: same numbers, same names, a cold start flat in depth."""

import copy

import pytest
import torch
from layered import bert, gemma, gpt2, llama, mixtral, resnet, t5, vit, whisper
from marks import quick
from peft_fx.passes.dynamo.outline import Block
from torch._dynamo.utils import counters
from torch.utils import _pytree as pytree

import peft_fx as fx

LORA = {"peft_type": "LORA", "r": 2, "init_lora_weights": False, "target_modules": "all-linear"}


def ids(vocabulary=32, length=6):
    return {"input_ids": torch.randint(0, vocabulary, (3, length)), "attention_mask": torch.ones(3, length).long()}


def decoder(**more):
    return {**ids(), "decoder_input_ids": torch.randint(0, 32, (3, 5)), **more}


SPEECH = {"input_features": torch.randn(3, 8, 20), "decoder_input_ids": torch.randint(0, 32, (3, 5))}
# model, inputs, options, the blocks of each class in the order in which classes first occur
FAMILIES = {
    "llama": (llama, ids(), {}, [[f"model.layers.{i}" for i in range(3)]]),
    "gemma3": (gemma, ids(), {}, [[f"model.layers.{i}" for i in range(4)]]),
    "gpt2": (gpt2, ids(), {}, [[f"transformer.h.{i}" for i in range(3)]]),
    "bert": (bert, ids(), {}, [[f"encoder.layer.{i}" for i in range(3)]]),
    "t5": (t5, decoder(), {}, [["encoder.block.0"], ["encoder.block.1", "encoder.block.2"],
                               ["decoder.block.0"], ["decoder.block.1", "decoder.block.2"]]),
    "whisper": (whisper, SPEECH, {}, [[f"model.encoder.layers.{i}" for i in range(3)],
                                      [f"model.decoder.layers.{i}" for i in range(3)]]),
    "vit": (vit, {"pixel_values": torch.randn(3, 3, 8, 8)}, {}, [[f"vit.layers.{i}" for i in range(3)]]),
    "mixtral": (mixtral, ids(), {}, [[f"model.layers.{i}" for i in range(3)]]),
    "resnet": (resnet, {"pixel_values": torch.randn(2, 3, 32, 32)}, {"target_modules": r".*convolution"}, None),
}  # fmt: skip


@pytest.fixture(scope="module", params=quick(FAMILIES, "llama"))
def family(request):
    """(model, adapted graph, inputs, expected classes), adapters away from where they start."""
    build, inputs, options, expected = FAMILIES[request.param]
    torch.manual_seed(0)
    model = build().eval()
    tuned = fx.apply(fx.capture(model, kwargs=inputs), {**LORA, **options})
    return request.param, tuned, inputs, expected


def numbers(output):
    return [t for t in pytree.tree_leaves(dict(output)) if isinstance(t, torch.Tensor) and t.is_floating_point()]


def gradients(graph, inputs):
    graph.zero_grad()
    sum(t.square().mean() for t in numbers(graph(**inputs))).backward()
    return {n: p.grad.clone() for n, p in graph.named_parameters() if p.grad is not None}


def groups(outlined):
    found = {}
    for node in outlined.graph.nodes:
        if node.op == "call_module" and isinstance(outlined.get_submodule(node.target), Block):
            found.setdefault(type(outlined.get_submodule(node.target)), []).append(node.target)
    return [names for names in found.values() if not names[0].startswith("peft_fx.")]


def test_equal_layers_become_blocks_of_one_class_with_the_same_outputs_names_and_gradients(family):
    _, tuned, inputs, expected = family
    outlined = fx.outline(tuned)
    found = groups(outlined)
    assert expected is None or found == expected
    assert max(map(len, found)) >= 2
    assert all(torch.equal(a, b) for a, b in zip(numbers(outlined(**inputs)), numbers(tuned(**inputs)), strict=True))
    assert list(outlined.state_dict()) == list(tuned.state_dict())
    ours, flat = gradients(outlined, inputs), gradients(tuned, inputs)
    assert ours.keys() == flat.keys() and all(torch.equal(ours[k], flat[k]) for k in flat)
    inlined = fx.inline(outlined)
    assert not groups(inlined) and inlined.code == tuned.code


@pytest.mark.slow
def test_resnet_s_stages_are_cut_where_blocks_are_equal():
    _, inputs, options, _ = FAMILIES["resnet"]
    torch.manual_seed(0)
    found = groups(fx.outline(fx.apply(fx.capture(resnet().eval(), kwargs=inputs), {**LORA, **options})))
    stage = "resnet.encoder.stages.{}.layers.{}".format
    assert [stage(0, i) for i in range(3)] in found and max(map(len, found)) == 3


@pytest.fixture(scope="module")
def depths():
    torch.manual_seed(0)
    return {n: fx.apply(fx.capture(llama(n).eval(), kwargs=ids()), LORA) for n in (2, 5)}


def graphs_compiled(work):
    torch._dynamo.reset()
    before = counters["stats"]["unique_graphs"]
    work()
    return counters["stats"]["unique_graphs"] - before


@pytest.mark.slow
def test_the_number_of_compiled_graphs_does_not_grow_with_depth(depths):
    def inference(graph):
        with torch.no_grad():
            fx.compile(graph, backend="aot_eager")(**ids())

    def training(graph):
        gradients(fx.compile(graph, backend="aot_eager"), ids())

    assert {n: graphs_compiled(lambda g=g: inference(g)) for n, g in depths.items()} == {2: 3, 5: 3}
    assert {n: graphs_compiled(lambda g=g: training(g)) for n, g in depths.items()} == {2: 4, 5: 4}


@pytest.mark.slow
def test_compiled_blocks_give_the_flat_graph_s_outputs_and_gradients_at_any_length(depths):
    compiled = fx.compile(depths[5], backend="aot_eager")
    for length in (6, 9, 4):
        inputs = ids(length=length)
        expected, found = gradients(depths[5], inputs), gradients(compiled, inputs)
        assert expected.keys() == found.keys()
        assert all(torch.allclose(found[k], expected[k], atol=1e-6) for k in expected)


@pytest.mark.slow
def test_inductor_compiles_blocks_for_training_and_inference(depths):
    compiled, inputs = fx.compile(depths[2]), ids()
    expected, found = gradients(depths[2], inputs), gradients(compiled, inputs)
    assert all(torch.allclose(found[k], expected[k], atol=1e-5) for k in expected)
    with torch.no_grad():
        pairs = zip(numbers(compiled(**inputs)), numbers(depths[2](**inputs)), strict=True)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in pairs)


@pytest.mark.slow
def test_swaps_and_switches_reach_compiled_blocks_without_recompiling(depths, tmp_path):
    other = fx.apply(fx.set_adapter(depths[2], []), LORA, "other")
    other = fx.delete_adapter(fx.set_adapter(other, "other"), "default")
    fx.save_adapter(other, tmp_path / "other")
    fx.save_adapter(depths[2], tmp_path / "default")
    inputs = ids()
    reserved = fx.compile(fx.reserve(depths[2], slots=2), backend="aot_eager")
    with torch.no_grad():
        first, expected = numbers(reserved(**inputs)), numbers(other(**inputs))
        with torch.compiler.set_stance("fail_on_recompile"):
            fx.hotswap(reserved, tmp_path / "other", "other")
            fx.switch(reserved, "other")
            swapped = numbers(reserved(**inputs))
            fx.switch(reserved, "default")
            back = numbers(reserved(**inputs))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(swapped, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(back, first, strict=True))
    fx.save_adapter(reserved, tmp_path / "saved", "default")


def test_copies_of_a_cut_graph_hold_their_own_tensors(depths):
    outlined, inputs = fx.outline(depths[2]), ids()
    copied = copy.deepcopy(outlined)
    before = numbers(outlined(**inputs))
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert all(torch.equal(a, b) for a, b in zip(numbers(outlined(**inputs)), before, strict=True))
    assert not any(t.any() for t in numbers(copied(**inputs)))
    assert {type(copied.get_submodule(f"model.layers.{i}")) for i in range(2)} == {
        type(outlined.get_submodule("model.layers.0"))
    }


@pytest.mark.slow
def test_ranks_by_pattern_group_blocks_by_equal_shape():
    torch.manual_seed(0)
    graph = fx.capture(llama(4).eval(), kwargs=ids())
    tuned = fx.apply(graph, {**LORA, "rank_pattern": {r"layers\.[01]\..*": 3}})
    assert groups(fx.outline(tuned)) == [["model.layers.0", "model.layers.1"], ["model.layers.2", "model.layers.3"]]


def test_what_repeats_nothing_is_one_part_and_a_cut_graph_is_not_cut_again(depths):
    torch.manual_seed(0)
    layer = fx.capture(torch.nn.Linear(4, 3), args=(torch.randn(2, 4),))
    assert groups(fx.outline(layer)) == [] and fx.outline(layer)(torch.ones(2, 4)).shape == (2, 3)
    with pytest.raises(fx.GraphError, match="cut already"):
        fx.outline(fx.outline(depths[2]))


def test_a_model_that_was_not_captured_is_refused():
    with pytest.raises(fx.GraphError, match="compile needs a graph made by peft_fx.capture"):
        fx.compile(llama())
