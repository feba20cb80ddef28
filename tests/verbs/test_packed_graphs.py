"""Graphs over packed weights: what every verb gives is what it gives for the same numbers dense."""

import copy

import pytest
import torch
from packed_models import batch, llama

import peft_fx

METHODS = {
    "LORA": {"r": 4, "init_lora_weights": False},
    "OFT": {"oft_block_size": 8, "init_weights": False},
    "HIRA": {"r": 4, "init_weights": False},
    "IA3": {"feedforward_modules": [], "init_ia3_weights": False},
}


def config(method):
    return peft_fx.methods.get_config(method)(target_modules=["q_proj", "v_proj"], **METHODS[method])


def trained(graph):
    return {name: p for name, p in graph.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module", params=["nf4", "int8"])
def bases(request):
    """(model, its graph, the dense graph with the same numbers), two layers."""
    packed = llama(request.param)
    return packed, peft_fx.capture(packed), peft_fx.capture(llama(like=packed))


@pytest.fixture(scope="module")
def tuned(bases):
    torch.manual_seed(1)
    return peft_fx.apply(bases[1], config("LORA"))


def logits(graph):
    return graph(**batch()).logits


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_a_captured_model_computes_what_it_did(bases, training):
    model, graph, _ = bases
    assert torch.equal(logits(graph.train(training)), logits(model.train(training)))
    graph.eval(), model.eval()


@pytest.mark.parametrize("method", METHODS)
def test_adapters_train_as_on_dense_weights(bases, method):
    graphs, results = [peft_fx.apply(g, config(method)).train() for g in bases[1:]], []
    for theirs, mine in zip(*(trained(g).values() for g in graphs), strict=True):
        mine.data.copy_(theirs.data)
    for graph in graphs:
        y = logits(graph)
        y.square().mean().backward()
        results.append([y, *(p.grad for p in trained(graph).values())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_equal_layers_are_stamped_out(caplog):
    with caplog.at_level("INFO", "peft_fx"):
        graph = peft_fx.capture(model := llama("nf4", layers=6))
    assert "stamped out: model.layers (6 layers)" in caplog.text
    assert torch.equal(logits(graph), logits(model))


def test_no_dense_weight_lives_from_forward_to_backward(bases):
    graph = peft_fx.apply(bases[1], config("LORA")).train()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        logits(graph)
    own = {p.untyped_storage().data_ptr() for p in graph.parameters()}  # the head is dense
    made = [t for t in saved if t.is_floating_point() and t.untyped_storage().data_ptr() not in own]
    dense = [t.shape for t in made if tuple(t.shape) in ((128, 64), (64, 128))]
    packed = [t for t in saved if t.dtype in (torch.uint8, torch.int8) and t.numel() >= 1024]
    assert not dense and len(packed) == 11  # of 14: what the first layer projects needs no gradient


def test_a_copy_is_swapped_alone(tuned, bases, tmp_path):
    before = logits(tuned.eval())
    torch.manual_seed(2)
    other = peft_fx.apply(bases[1], config("LORA")).eval()
    peft_fx.save_adapter(other, tmp_path)
    copied = copy.deepcopy(tuned)
    peft_fx.hotswap(copied, tmp_path)
    assert torch.equal(logits(copied), logits(other)) and torch.equal(logits(tuned), before)


def test_a_file_gives_the_graph_back(tuned, tmp_path):
    expected = logits(tuned.eval())
    peft_fx.export(tuned, tmp_path / "tuned.pt2")
    loaded = peft_fx.load(tmp_path / "tuned.pt2")
    assert torch.equal(logits(loaded), expected)
    merged = peft_fx.merge(loaded, storage="dense")
    assert torch.equal(logits(peft_fx.unmerge(merged)), expected)


def test_a_program_for_other_runtimes_has_plain_operators(tuned):
    program = peft_fx.export(tuned.train(), decompose=True)
    names = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert not any("peft_fx" in name for name in names)
    assert torch.equal(logits(program.module(check_guards=False)), logits(tuned))


def test_slots_outline_and_compiled_graphs_compute_the_same(tuned, fresh_dynamo):
    expected = logits(tuned.eval())
    for graph in (peft_fx.reserve(tuned, slots=2), peft_fx.outline(tuned)):
        assert torch.equal(logits(graph), expected)
    compiled = torch.compile(tuned, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(**batch()).logits, expected)


def test_a_mixed_batch_gathers_on_packed_weights(tuned, bases, tmp_path):
    peft_fx.save_adapter(tuned.eval(), tmp_path)
    both = peft_fx.load_adapter(tuned, tmp_path, adapter_name="again")
    mixed = peft_fx.mixed_batch(peft_fx.set_adapter(both, ["default", "again"]))
    y = mixed(**batch(), adapter_ids=torch.tensor([0, 1, -1])).logits
    assert (y[:2] - logits(tuned)[:2]).abs().max() < 1e-5 and (y[2:] - logits(bases[1])[2:]).abs().max() < 1e-5


@pytest.mark.slow
def test_a_package_keeps_weights_packed(tuned, tmp_path):
    tuned.train()
    expected = logits(tuned)
    path = peft_fx.package(tuned.eval(), tmp_path / "packed.pt2")
    assert (logits(peft_fx.load_package(path)) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_the_backend_adapts_packed_layers(bases, training, fresh_dynamo):
    model = copy.deepcopy(bases[0]).train(training)
    graph = peft_fx.apply(bases[1], config("LORA")).train(training)
    backend = peft_fx.backend(config("LORA"), model=model)
    for theirs, mine in zip(backend.parameters(), trained(graph).values(), strict=True):
        mine.data.copy_(theirs.data)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    assert torch.equal(compiled(**batch(), use_cache=False).logits, logits(graph))
    bases[1].eval()


def test_blocks_are_computed_again_in_the_backward(bases):
    torch.manual_seed(3)
    config = peft_fx.LoraConfig(target_modules=["q_proj", "down_proj"], r=4, init_lora_weights=False, lora_dropout=0.1)
    plain = peft_fx.apply(bases[1], config).train()
    kept, results = [], []
    for graph in (plain, peft_fx.prepare_kbit(plain)):
        torch.manual_seed(4)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t.numel()) or t, lambda t: t):
            y = logits(graph)
        y.square().mean().backward()
        results.append([y.detach(), *(p.grad.clone() for p in trained(plain).values())])
        kept.append(sum(saved))
        plain.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert kept[1] < 0.5 * kept[0]
    bases[1].eval()


def test_parameters_in_half_precision_are_refused():
    graph = peft_fx.capture(llama("nf4").to(torch.bfloat16))
    with pytest.raises(peft_fx.GraphError, match="prepare_model_for_kbit_training"):
        peft_fx.prepare_kbit(graph)
