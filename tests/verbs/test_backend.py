"""`peft_fx.backend`: adapters in Dynamo's graphs act as in captured ones, and as PEFT's."""

import copy
import gc
import weakref

import peft
import pytest
import torch
from graphs import inputs, model_of
from tiny import llama
from torch import nn

import peft_fx
from peft_fx.verbs.backend import Variant

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fresh_dynamo")]

ALL = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"}


def adapted(model, config, **options):
    """A backend whose adapters are away from their initial values."""
    new = peft_fx.backend(config, model=model, **options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return new


def small_llama(**options):
    torch.manual_seed(0)
    return llama(**{"num_hidden_layers": 1, **options}).eval()


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def logits(result):
    return result if isinstance(result, torch.Tensor) else result.logits


# Equal results


@pytest.mark.parametrize("inner", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_peft_and_a_captured_graph_give_the_same(inner, tmp_path):
    model, x = model_of("tied_llama"), inputs("tied_llama")
    backend = adapted(model, ALL, inner=inner)
    backend.save_adapter(tmp_path)
    graph = peft_fx.load_adapter(peft_fx.capture(model, kwargs=x), tmp_path)
    reference = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
    out = torch.compile(model, backend=backend, fullgraph=True)(**x).logits
    torch.testing.assert_close(out, reference(**x).logits)
    torch.testing.assert_close(out, graph(**x).logits)
    assert (out - model(**x).logits).abs().max() > 0.1
    out.square().sum().backward()
    assert all(p.grad is not None for p in backend.parameters())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


CONFIGS = {
    "embedding, tied to the head": ("tied_llama", {**ALL, "target_modules": ["embed_tokens", "q_proj"]}),
    "dora": ("tied_llama", {**ALL, "use_dora": True}),
    "weight form": ("tied_llama", {"peft_type": "LOHA", "r": 2, "target_modules": ["q_proj", "down_proj"]}),
    "asked for": ("tied_llama", ALL),
    "input map": ("tied_llama", {"peft_type": "OFT", "oft_block_size": 4, "target_modules": ["q_proj", "v_proj"]}),
    "shared tensors": ("tied_llama", {"peft_type": "VERA", "r": 3, "target_modules": ["q_proj", "o_proj"]}),
    "own copies": ("tied_llama", {**ALL, "target_modules": ["q_proj"], "modules_to_save": ["norm"]}),
    "biases": ("bert", {**ALL, "target_modules": ["query"], "bias": "all"}),
    "Conv1D": ("gpt2", {**ALL, "target_modules": "all-linear"}),
    "two stacks": ("t5", ALL),
    "experts": ("mixtral", {"peft_type": "LORA", "r": 2, "target_parameters": ["mlp.experts.gate_up_proj"]}),
    "convolution, embedding": ("mixed", {**ALL, "target_modules": ["embed", "conv", "turned", "head"]}),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_captured_graph_gives_the_same(case, tmp_path):
    name, config = CONFIGS[case]
    model, x = model_of(name), inputs(name)
    if name == "t5":
        x["decoder_input_ids"] = x["input_ids"]
    options = {"lowering": "weight"} if case == "asked for" else {}
    backend = adapted(model, config, **options)
    backend.save_adapter(tmp_path)
    graph = peft_fx.load_adapter(peft_fx.capture(model, kwargs=x), tmp_path, **options)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    out = logits(compiled(**x))
    torch.testing.assert_close(out, logits(graph(**x)))
    assert (out - logits(model(**x))).abs().max() > 0.01
    names = dict(backend.named_parameters())
    trained = {n.removeprefix("peft_fx.adapters."): p for n, p in graph.named_parameters() if "peft_fx.adapters" in n}
    assert names.keys() == trained.keys()


def test_dropout_follows_the_mode(tmp_path):
    model, x = model_of("mixed"), inputs("mixed")
    backend = adapted(model, {**ALL, "target_modules": ["plain", "head"], "lora_dropout": 0.5})
    backend.save_adapter(tmp_path)
    graph = peft_fx.load_adapter(peft_fx.capture(model, kwargs=x), tmp_path)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for training in (False, True, False, True):
        model.train(training), graph.train(training)
        torch.manual_seed(3)
        out = compiled(**x)
        torch.manual_seed(3)
        torch.testing.assert_close(out, graph(**x))
    assert not torch.equal(compiled(**x), compiled(**x))


def test_dropout_follows_the_mode_where_the_model_itself_does_not_ask_for_it():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 4)).eval(), torch.randn(3, 4)
    compiled = torch.compile(model, backend=adapted(model, {**ALL, "target_modules": ["0"], "lora_dropout": 0.5}))
    quiet = compiled(x)
    model.train()
    assert not torch.equal(compiled(x), quiet) and not torch.equal(compiled(x), compiled(x))
    model.eval()
    assert torch.equal(compiled(x), quiet)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("config", [ALL, {**ALL, "use_dora": True}], ids=["lora", "dora"])
def test_autocast(config, inside, tmp_path):
    model = small_llama()
    backend, x = adapted(model, config), inputs("llama")
    backend.save_adapter(tmp_path)
    reference = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()

    def call(model):
        with torch.autocast("cpu", torch.bfloat16):
            return model(**x).logits

    if inside:
        out = torch.compile(call, backend=backend, fullgraph=True)(model)
    else:
        out = call(torch.compile(model, backend=backend, fullgraph=True))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, call(reference), rtol=0.02, atol=0.02)


# Training


@pytest.mark.parametrize("inner", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_losses_are_pefts(inner, checkpointed, tmp_path):
    model = small_llama().train()
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    backend = adapted(model, {**ALL, "lora_dropout": 0.1 if inner == "eager" else 0.0}, inner=inner)
    backend.save_adapter(tmp_path)
    reference = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path, is_trainable=True).train()
    losses = [
        train(torch.compile(model, backend=backend), backend.parameters()),
        train(reference, [p for p in reference.parameters() if p.requires_grad]),
    ]
    torch.testing.assert_close(*losses)


def train(model, parameters, steps=4):
    optimizer, x, losses = torch.optim.SGD(parameters, lr=0.1), inputs("llama"), []
    torch.manual_seed(5)  # of dropouts
    for _ in range(steps):
        loss = model(**x, labels=x["input_ids"].clone()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


# Many graphs, one set of tensors


def test_generate_with_a_growing_cache(tmp_path):
    model, ids = small_llama(), inputs("llama")["input_ids"]
    folders = [tmp_path / "a", tmp_path / "b"]
    wanted = []
    for folder, seed in zip(folders, (1, 2), strict=True):
        torch.manual_seed(seed)
        adapted(copy.deepcopy(model), {**ALL, "r": 2 * seed, "init_lora_weights": False}).save_adapter(folder)
        reference = peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()
        wanted.append(greedy(reference, ids))
    backend = peft_fx.backend(folders[1], model=model)
    model.compile(backend=backend, fullgraph=True)
    assert torch.equal(greedy(model, ids), wanted[1])
    count = graphs()
    assert count >= 3  # prefill, the first decoding step, those of any length
    backend.hotswap(folders[0])
    assert torch.equal(greedy(model, ids), wanted[0]) and not torch.equal(*wanted)
    assert graphs() == count


def greedy(model, ids):
    return model.generate(input_ids=ids, max_new_tokens=8, do_sample=False, pad_token_id=0)


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


class Block(nn.Module):
    """Experts that run if some row asks for them."""

    def __init__(self):
        super().__init__()
        self.router, self.experts = nn.Linear(8, 3), nn.ModuleList(Expert() for _ in range(3))

    def forward(self, x):
        choice, y = self.router(x).argmax(-1), torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows = (choice == i).nonzero().flatten()
            if rows.numel() > 0:
                y = y.index_add(0, rows, expert(x[rows]))
        return x + y


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks, self.head = nn.ModuleList(Block() for _ in range(4)), nn.Linear(8, 5)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def mixture():
    torch.manual_seed(0)
    return Experts().eval()


@pytest.mark.filterwarnings("ignore:.*targets, first")
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_a_model_that_cannot_be_captured(inner, tmp_path):
    model = mixture()
    with pytest.raises(peft_fx.CaptureError):
        peft_fx.capture(model, args=(torch.randn(16, 8),))
    backend = adapted(model, {**ALL, "target_modules": ["up", "down", "router", "head"]}, inner=inner)
    backend.save_adapter(tmp_path)
    reference = peft.PeftModel.from_pretrained(mixture(), tmp_path, is_trainable=True).eval()
    compiled = torch.compile(model, backend=backend)
    for rows in (16, 16, 33, 50):
        x = torch.randn(rows, 8)
        torch.testing.assert_close(compiled(x), reference(x))
    assert graphs() < 17  # 4 routers, 12 experts, 1 head, of several sizes: modules share graphs
    compiled(x).square().mean().backward(), reference(x).square().mean().backward()
    wanted = {
        n.removeprefix("base_model.model.").replace(".default.weight", ""): p.grad
        for n, p in reference.named_parameters()
    }
    for name, parameter in backend.named_parameters():
        key = name.removeprefix("default.").replace(".on_weight.", ".")
        torch.testing.assert_close(parameter.grad, wanted[key])


class OwnProduct(nn.Module):
    """Its function is left to Python: a graph break in a loop. `inner` is compiled."""

    def __init__(self):
        super().__init__()
        self.weight, self.inner = nn.Parameter(torch.randn(8, 8)), Expert()

    def forward(self, x):
        for _ in range(2):
            if x.sum() > 0:
                x = self.inner(x) @ self.weight
        return x


def test_what_dynamo_leaves_to_python_is_refused():
    model = nn.Sequential(OwnProduct())
    backend = peft_fx.backend({**ALL, "target_modules": [], "target_parameters": ["0.weight"]}, model=model)
    with pytest.raises(Exception, match="Dynamo left the forward of 0 to Python"):
        torch.compile(model, backend=backend)(torch.ones(2, 8))


def test_targets_in_no_graph_are_named():
    model = nn.ModuleDict({"used": nn.Linear(4, 4), "unused": nn.Linear(4, 4)})
    backend = peft_fx.backend({**ALL, "target_modules": ["used", "unused"]}, model=model)
    compiled = torch.compile(lambda x: model["used"](x), backend=backend)
    compiled(torch.ones(2, 4))
    with pytest.warns(UserWarning, match=r"1 of 2 targets, first unused\.weight"):
        compiled(torch.ones(2, 4))


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_one_layers_graph_serves_the_others_with_their_own_adapters(inner, tmp_path):
    """A function of a layer, compiled once, is called with each layer's parameters; one has another rank, one no adapter."""
    torch.manual_seed(0)
    model, x = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4))), torch.randn(2, 4, requires_grad=True)
    backend = adapted(model, {**ALL, "target_modules": ["0", "1", "2"], "rank_pattern": {"2": 2}}, inner=inner)
    backend.save_adapter(tmp_path)
    reference = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    step = torch.compile(lambda layer, x: nn.functional.linear(x, layer.weight, layer.bias), backend=backend)
    want = x
    for layer in model:
        x = step(layer, x)
    torch.testing.assert_close(x, reference(want))
    assert graphs() == (
        1 if inner == "eager" else 3
    )  # three structures; Dynamo saw the first, and traces the others for AOT


# The object


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_set_adapter(inner):
    model, x = small_llama(), inputs("llama")
    recipe = {"adapters": {"a": ALL, "b": {**ALL, "r": 2}}}
    backend = adapted(model, recipe, inner=inner)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    both, count = compiled(**x).logits, graphs()
    backend.set_adapter("a")
    one = compiled(**x).logits
    backend.set_adapter(())
    torch.testing.assert_close(compiled(**x).logits, model(**x).logits)
    backend.set_adapter(["a", "b"])
    assert torch.equal(compiled(**x).logits, both) and not torch.equal(one, both)
    assert graphs() == count + (0 if inner == "eager" else 2)
    shorter = {name: value[:, :4] for name, value in x.items()}
    backend.set_adapter(())
    torch.testing.assert_close(compiled(**shorter).logits, model(**shorter).logits)


@pytest.mark.parametrize("how", ["torch.compile", "model.compile"])
def test_the_model_is_found(how):
    model, backend = small_llama(), peft_fx.backend(ALL)
    with pytest.raises(peft_fx.PeftFxError, match="no model yet"):
        backend.parameters()
    if how == "torch.compile":
        torch.compile(model, backend=backend)(**inputs("llama"))
    else:
        model.compile(backend=backend)
        model(**inputs("llama"))
    assert backend.model is model and len(list(backend.parameters())) == 14


def test_refusals():
    model = small_llama()
    backend = peft_fx.backend(ALL, model=model)
    assert backend.attach(torch.compile(model)) is backend
    with pytest.raises(peft_fx.PeftFxError, match="another LlamaForCausalLM"):
        backend.attach(small_llama())
    with pytest.raises(peft_fx.RecipeError, match="layer_replication"):
        peft_fx.backend({**ALL, "layer_replication": [[0, 1], [0, 1]]}, model=model)
    with pytest.raises(peft_fx.RecipeError, match="nothing to adapt"):
        peft_fx.backend({**ALL, "target_modules": ["no_such"]}, model=model)


def test_the_model_stays_as_it_was():
    model, x = small_llama(), inputs("llama")
    before, names = model(**x).logits, list(model.state_dict())
    backend = adapted(model, ALL)
    torch.compile(model, backend=backend)(**x)
    assert torch.equal(model(**x).logits, before) and list(model.state_dict()) == names
    copy.deepcopy(model)


def test_adapters_that_come_and_go_act_and_leave_nothing():
    """Dynamo gives up after eight graphs for one function, and runs it without adapters from then on."""
    model, x = small_llama(), inputs("llama")
    backend = adapted(model, ALL)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    first, count = compiled(**x).logits, graphs()
    gone, kept = [], []
    for i in range(10):
        name = f"a{i}"
        backend.add(name, peft_fx.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
        backend.set_adapter(name)
        assert not torch.equal(compiled(**x).logits, first)
        gone += [weakref.ref(p) for full, p in backend.named_parameters() if full.startswith(f"{name}.")]
        backend.set_adapter("default")
        assert torch.equal(compiled(**x).logits, first)
        backend.delete(name)
        compiled(**x)
        gc.collect()
        kept.append(sum(type(o) is Variant for o in gc.get_objects()))
    assert graphs() == count
    assert len(gone) == 140 and not [ref for ref in gone if ref() is not None]
    assert len(set(kept)) == 1 and kept[0] > 0
    assert {len(m._forward_pre_hooks) for m in model.modules()} == {0, 1}
