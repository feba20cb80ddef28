"""How calls of a PeftModel run: module by module, and what may be done to the model around that."""

import copy
import pickle
import threading

import accelerate
import peft
import pytest
import torch
from graphs import inputs, model_of
from marks import quick
from torch import nn

import peft_fx
from peft_fx.hf.hosts import traced

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

LORA = dict(r=4, lora_alpha=32, target_modules="all-linear", init_lora_weights=False)


def tuned(name="tied_llama", **config):
    torch.manual_seed(0)
    return peft_fx.get_peft_model(model_of(name).eval(), {"peft_type": "LORA", **LORA, **config}).eval()


def logits(model, name="tied_llama", **more):
    return model(**inputs(name), **more).logits


def pefts(model, folder, name="tied_llama"):
    """PEFT's model with the adapter of ours."""
    model.save_pretrained(folder)
    return peft.PeftModel.from_pretrained(model_of(name).eval(), folder)


def through_dynamo(model):
    return [h.path for h in model.base_model.hosts.opened.values() if h.dynamo]


@pytest.mark.parametrize("name", quick(("tied_llama", "gpt2", "bert", "mixtral"), "tied_llama"))
def test_a_users_torch_compile_takes_the_whole_adapted_model(name, tmp_path):
    """One graph, before any call was made; in it a swap compiles nothing."""
    # experts depend on values: they are Dynamo's, and a graph break
    targets = {"target_modules": ["q_proj", "v_proj"]} if name == "mixtral" else {}
    model = tuned(name, **targets)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = compiled(**inputs(name))[0]
    torch.testing.assert_close(found, model(**inputs(name))[0])
    tuned(name, r=2, lora_alpha=7, **targets).save_pretrained(tmp_path)
    with torch.compiler.set_stance("fail_on_recompile"):
        peft_fx.hotswap_adapter(model, tmp_path, "default")
        swapped = compiled(**inputs(name))[0]
    torch.testing.assert_close(swapped, pefts(model, tmp_path / "new", name)(**inputs(name))[0])
    assert (swapped - found).abs().max() > 1e-3


def test_a_model_prepared_for_swaps_takes_larger_ranks_without_compiling(tmp_path):
    model = tuned()
    tuned(r=12, lora_alpha=5).save_pretrained(tmp_path)
    before = logits(model)
    peft_fx.prepare_model_for_compiled_hotswap(model, target_rank=16)
    torch.testing.assert_close(logits(model), before)
    model.compile(backend="aot_eager", fullgraph=True)
    logits(model)
    with torch.compiler.set_stance("fail_on_recompile"):
        peft_fx.hotswap_adapter(model, tmp_path, "default")
        found = logits(model)
    theirs = peft.PeftModel.from_pretrained(model_of("tied_llama").eval(), tmp_path)
    torch.testing.assert_close(found, logits(theirs))
    with pytest.raises(ValueError, match="before"):
        peft_fx.prepare_model_for_compiled_hotswap(model, target_rank=16)


@pytest.mark.slow
def test_inductor_and_export_take_it_too():
    model = tuned()
    expected = logits(model)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(**inputs("tied_llama")).logits, expected)
    program = torch.export.export(model, (), {**inputs("tied_llama"), "use_cache": False}, strict=False)
    torch.testing.assert_close(program.module()(**inputs("tied_llama"), use_cache=False).logits, expected)


@pytest.mark.usefixtures("activation_form")  # PEFT's, down to the bits; in weight form bf16 rounds elsewhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_is_pefts(tmp_path, dtype):
    model = peft_fx.get_peft_model(model_of("tied_llama").to(dtype).eval(), {"peft_type": "LORA", **LORA}).eval()
    model.save_pretrained(tmp_path)
    reference = peft.PeftModel.from_pretrained(model_of("tied_llama").to(dtype).eval(), tmp_path)
    for enabled in (True, False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            # without autocast PEFT casts a half-precision base's input to the adapter's dtype, we the adapter to the base's
            tolerance = 0 if enabled or dtype == torch.float32 else 1e-2
            torch.testing.assert_close(logits(model), logits(reference), atol=tolerance, rtol=0)


def test_copies_are_adapted_and_apart():
    model = tuned()
    before = logits(model)
    pickled = pickle.loads(pickle.dumps(model))
    for copied in (copy.deepcopy(model), copy.deepcopy(model.get_base_model()), pickled):
        assert torch.equal(logits(copied), before)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.base_model.adapters.parameters():
            parameter.zero_()
    assert torch.equal(logits(model), before) and not torch.equal(logits(copied), before)
    copied.add_adapter("other", model.peft_config["default"])
    copied.set_adapter("other")
    assert not torch.equal(logits(copied), logits(model)) and copied.merge_and_unload() is not model.get_base_model()


def test_tensors_may_be_replaced_and_moved():
    """What runs reads the tensors that the modules hold at the time."""
    model = tuned()
    before = logits(model)
    q = model.get_base_model().model.layers[0].self_attn.q_proj
    q.weight = nn.Parameter(2 * q.weight.detach())
    doubled = logits(model)
    assert not torch.equal(doubled, before)
    q.weight = nn.Parameter(q.weight.detach() / 2)
    assert torch.equal(logits(model), before)
    wide = copy.deepcopy(model).double()
    torch.testing.assert_close(logits(wide).float(), before)
    assert logits(model.to(torch.bfloat16)).dtype == torch.bfloat16


def test_hooks_see_their_module():
    model = tuned()
    seen = []
    q = model.get_base_model().model.layers[0].self_attn.q_proj
    handle = q.register_forward_hook(lambda module, args, output: seen.append(output) or 0 * output)
    zeroed = logits(model)
    handle.remove()
    assert len(seen) == 1 and not torch.equal(zeroed, logits(model))


class Packed(nn.Linear):
    """Its forward does not read `weight`."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.packed = self.weight.detach().clone()

    def forward(self, x):
        return x @ self.packed.T


def test_a_module_that_does_not_read_its_weight_is_named():
    model = peft_fx.get_peft_model(
        nn.Sequential(nn.Linear(4, 4), Packed(4, 4)), peft_fx.LoraConfig(target_modules=["0", "1"])
    )
    model(torch.ones(2, 4))
    with pytest.warns(UserWarning, match="1 of 2 adapted modules, first 1, did not use their weights"):
        model(torch.ones(2, 4))


def test_weights_that_accelerate_brings_at_each_call(tmp_path):
    expected = logits(tuned())
    model = accelerate.cpu_offload(model_of("tied_llama").eval(), execution_device="cpu")
    tuned().save_pretrained(tmp_path)
    model = peft_fx.PeftModel.from_pretrained(model, tmp_path)
    assert model.get_base_model().model.layers[0].self_attn.q_proj.weight.device.type == "meta"
    torch.testing.assert_close(logits(model), expected)


def test_a_call_in_one_thread_and_a_swap_in_another(tmp_path):
    """No call sees some old numbers and some new ones."""
    model = tuned()
    folders = [tmp_path / "one", tmp_path / "two"]
    model.save_pretrained(folders[0])
    tuned(lora_alpha=3).save_pretrained(folders[1])
    right = []
    for folder in folders:
        peft_fx.hotswap_adapter(model, folder, "default")
        right.append(logits(model).detach())
    found, done = [], threading.Event()

    def calls():
        while not done.is_set():
            found.append(logits(model).detach())

    thread = threading.Thread(target=calls)
    thread.start()
    for i in range(20):
        peft_fx.hotswap_adapter(model, folders[i % 2], "default")
    done.set()
    thread.join()
    assert found and all(any(torch.equal(y, r) for r in right) for y in found)


@pytest.mark.slow
def test_what_goes_through_dynamo(tmp_path):
    """A module with parts, one that reads its part's weight, and a stack of experts with a loop over them."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.last = nn.Linear(8, 4)

        def forward(self, x):
            return self.last(self.layer(self.attention(x, x, x)[0]))

    torch.manual_seed(0)
    net = Net().eval()
    x = torch.randn(2, 3, 8)
    graph = peft_fx.capture(net, (x,))
    recipe = {
        "peft_type": "LORA",
        "r": 2,
        "target_modules": ["attention", "linear1", "last"],
        "init_lora_weights": False,
    }
    model = peft_fx.get_peft_model(copy.deepcopy(net), recipe).eval()
    model.save_pretrained(tmp_path)
    with torch.no_grad():  # torch's fast path reads the weights of the layer's parts
        torch.testing.assert_close(model(x), peft_fx.load_adapter(graph, tmp_path)(x))
    assert through_dynamo(model) == ["attention", "layer"]
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.slow
def test_experts_are_adapted(tmp_path):
    model = tuned("mixtral", target_modules=["q_proj"], target_parameters=["gate_up_proj", "down_proj"])
    torch.testing.assert_close(logits(model, "mixtral"), logits(pefts(model, tmp_path, "mixtral"), "mixtral"))
    y = torch.compile(model, backend="eager")(**inputs("mixtral")).logits
    torch.testing.assert_close(y, logits(model, "mixtral"))


def test_a_forward_that_others_have_put_in_place_stays(tmp_path):
    base = model_of("tied_llama").eval()
    q = base.model.layers[0].self_attn.q_proj
    q.forward = lambda x: 2 * nn.Linear.forward(q, x)
    patched = q.forward
    model = peft_fx.get_peft_model(base, {"peft_type": "LORA", **LORA, "init_lora_weights": True}).eval()
    adapted = logits(model)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), adapted)
    assert not torch.allclose(adapted, logits(tuned(init_lora_weights=True)))
    assert model.unload() is base and q.forward is patched


@pytest.mark.slow
def test_a_graph_for_the_verbs_shares_the_adapters(tmp_path):
    model = tuned()
    expected = logits(model)
    for adapted in (model, model.get_base_model()):
        with pytest.raises(peft_fx.CaptureError, match="to_graph"):
            peft_fx.capture(adapted)
    graph = model.to_graph()
    x = inputs("tied_llama")
    torch.testing.assert_close(graph(**x).logits, expected)
    torch.testing.assert_close(peft_fx.merge(graph)(**x).logits, expected)
    tuned(r=2, lora_alpha=3).save_pretrained(tmp_path)
    peft_fx.hotswap(graph, tmp_path)
    torch.testing.assert_close(
        logits(model), logits(peft.PeftModel.from_pretrained(model_of("tied_llama").eval(), tmp_path))
    )
    torch.testing.assert_close(graph(**x).logits, logits(model))
    assert model.peft_config["default"].lora_alpha == 3
    peft_fx.save_adapter(graph, tmp_path / "graph")
    model.save_pretrained(tmp_path / "model")
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("graph", "model")]
    assert files[0] == files[1]


@pytest.mark.parametrize("called_before", [False, True])
def test_base_weights_that_the_user_trains_too_get_pefts_gradients(tmp_path, called_before):
    model = tuned()
    reference = pefts(model, tmp_path)
    base = model.get_base_model().model.layers[0].self_attn.q_proj
    theirs = reference.get_base_model().model.layers[0].self_attn.q_proj.base_layer
    if called_before:
        logits(model)
    for m, weight in ((model, base.weight), (reference, theirs.weight)):
        weight.requires_grad_(True)
        logits(m).square().mean().backward()
    torch.testing.assert_close(base.weight.grad, theirs.weight.grad)


def test_adapters_that_come_and_go_leave_nothing(monkeypatch):
    """Each with a config of its own, so that no graph serves two."""
    monkeypatch.setattr(traced, "ADAPTED", 3)
    model = tuned()
    hosts, first, kept = model.base_model.hosts, logits(model), []
    for i in range(6):
        name = f"a{i}"
        model.add_adapter(
            name, peft_fx.LoraConfig(r=2, lora_alpha=i + 1, target_modules="all-linear", init_lora_weights=False)
        )
        model.set_adapter(name)
        assert not torch.equal(logits(model), first)
        model.set_adapter("default")
        assert torch.equal(logits(model), first)
        model.delete_adapter(name)
        graphs = [len(graph.adapted) for graph in hosts.graphs.values()]
        assert len(graphs) > 1 and max(graphs) <= 3
        kept.append((len(graphs), len(hosts.snapshots.kept), len(hosts.opened), len(model.base_model.configs.known)))
    assert len(set(kept)) == 1
