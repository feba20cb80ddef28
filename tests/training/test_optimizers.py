"""LoRA+, LoRA-FA and the Riemannian optimiser, step by step beside PEFT's: same tensors, same gradients, same numbers after."""

import copy
import sys
import types
import warnings

import peft
import peft.optimizers
import pytest
import torch
from graphs import captured, inputs, model_of
from safetensors.torch import load_file

import peft_fx
from peft_fx import optimizers
from peft_fx.training.lorafa import projected
from peft_fx.verbs.tensors import parameters_of

LORA = dict(r=4, lora_alpha=12, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
# case -> (model, config)
CASES = {
    "linear": ("biased_llama", {}),
    "patterns": ("biased_llama", dict(rank_pattern={"down_proj": 2}, alpha_pattern={"q_proj": 3})),
    "embedding": ("biased_llama", dict(target_modules=["embed_tokens", "q_proj"])),
    "dora": ("biased_llama", dict(use_dora=True)),
    "bias": ("biased_llama", dict(lora_bias=True, target_modules=["q_proj"])),
    "saved": ("biased_llama", dict(modules_to_save=["lm_head", "model.norm"])),
    "layer norms": ("bert", dict(target_modules=["query"], modules_to_save=["LayerNorm", "classifier"])),
    "biases": ("biased_llama", dict(bias="all")),
    "whole embedding": ("biased_llama", dict(modules_to_save=["embed_tokens"])),
    "adalora": ("biased_llama", dict(peft_type="ADALORA", total_step=9)),
}
STEPS = 3


def file_key(name):
    """The key under which PEFT files a parameter of its model."""
    name = name.replace("magnitude_vector.default.weight", "magnitude_vector").replace(".modules_to_save.default", "")
    return name.replace(".default", "")


def given(key, shape, step):
    """The gradient of a step."""
    seed = sum(map(ord, key)) * STEPS + step
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def case(tmp_path, request):
    """(name of the model, PEFT's model, folder with its files)"""
    name, config = CASES[request.param]
    model = peft.get_peft_model(model_of(name), peft.get_peft_config({"peft_type": "LORA", **LORA, **config}))
    model.save_pretrained(tmp_path)
    return name, model, tmp_path


def holder(case, kind="model"):
    """The adapter in a PeftModel, in a graph or in a backend."""
    name, _, folder = case
    if kind == "graph":
        return peft_fx.load_adapter(captured(name), folder, trainable=True)
    if kind == "backend":
        return peft_fx.backend(folder, model=model_of(name))
    return peft_fx.PeftModel.from_pretrained(model_of(name), folder, is_trainable=True)


def stepped(holder, make):
    """File key -> number after some steps."""
    optimizer = make(optimizers, holder)
    own = {t.placement.file_key(t.name): t.tensor for t in parameters_of(holder)}
    for step in range(STEPS):
        for key, parameter in own.items():
            parameter.grad = given(key, parameter.shape, step) if parameter.requires_grad else None
        optimizer.step()
    return {key: p.detach() for key, p in own.items()}


def stepped_by_peft(model, make):
    own = {file_key(n): p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = make(peft.optimizers, model)
    for step in range(STEPS):
        for key, parameter in own.items():
            parameter.grad = given(key, parameter.shape, step) if parameter.requires_grad else None
        optimizer.step()
    return {key: p.detach() for key, p in own.items()}


def compare(case, make, kinds=("model",)):
    """(the file's numbers, those after the steps)"""
    before = load_file(case[2] / "adapter_model.safetensors")
    expected = stepped_by_peft(case[1], make)
    for kind in kinds:
        found = stepped(holder(case, kind), make)
        assert found.keys() == expected.keys() == {k for k in before if ".base_layer.w" not in k}
        assert [k for k in found if not torch.equal(found[k], expected[k])] == []
    return before, expected


def loraplus(library, model, cls=torch.optim.AdamW):
    return library.create_loraplus_optimizer(model, cls, lr=1e-2, loraplus_lr_ratio=8.0, loraplus_weight_decay=0.1,
                                             loraplus_lr_embedding=1e-3, **({"eps": 1e-7} if cls is torch.optim.AdamW else {}))  # fmt: skip


def riemannian(library, model, cls=torch.optim.SGD):
    return library.create_riemannian_optimizer(model, cls, lr=1e-2, reg=1e-3, weight_decay=0.1)


def lorafa(library, model, weight_decay=0.1, **options):
    return library.create_lorafa_optimizer(model, r=4, lora_alpha=12, lr=1e-2, weight_decay=weight_decay, **options)


def cases(*names):
    return pytest.mark.parametrize("case", names, indirect=True)


@cases(*CASES)
def test_loraplus_steps_as_pefts(case):
    compare(case, loraplus)


@cases("linear")
def test_loraplus_takes_any_optimiser_of_torch(case):
    compare(case, lambda library, model: loraplus(library, model, torch.optim.SGD))


@cases("whole embedding")
def test_loraplus_keeps_state_of_embeddings_in_32_bits_under_8_bit_adam(case, monkeypatch):
    kept = []
    manager = types.SimpleNamespace(override_config=lambda parameters, *option: kept.append((parameters, option)))
    optim = types.SimpleNamespace(GlobalOptimManager=types.SimpleNamespace(get_instance=lambda: manager))
    monkeypatch.setitem(sys.modules, "bitsandbytes", types.SimpleNamespace(optim=optim))
    model = holder(case)
    loraplus(optimizers, model, type("AdamW8bit", (torch.optim.AdamW,), {}))
    whole = [t.tensor for t in parameters_of(model) if "embed_tokens" in t.path]
    assert len(whole) == 1 and kept == [(whole, ("optim_bits", 32))]


@cases(*CASES)
def test_riemannian_steps_as_pefts(case):
    compare(case, riemannian)


@cases("linear", "patterns", "embedding", "saved", "layer norms", "biases")
def test_lorafa_steps_as_pefts(case):
    before, after = compare(case, lorafa)
    assert all(torch.equal(before[k], after[k]) == ("lora_A" in k or "embedding_A" in k) for k in after)


@pytest.mark.slow
@pytest.mark.parametrize("make", [loraplus, riemannian, lorafa])
@cases("saved")
def test_graphs_and_backends_step_as_a_peft_model(case, make):
    compare(case, make, kinds=("graph", "backend"))


@cases("dora", "bias")
def test_lorafa_pairs_b_with_its_own_a(case):
    """PEFT pairs neighbours: there the magnitude, or the bias, is taken for the next A. By the formula, then."""
    before = load_file(case[2] / "adapter_model.safetensors")
    found = stepped(holder(case), lorafa)
    for key, value in before.items():
        mean = square = 0
        A = before.get(key.replace("lora_B.weight", "lora_A.weight")) if key.endswith("lora_B.weight") else None
        for step in range(STEPS) if ".lora_A." not in key else ():
            g = given(key, value.shape, step)
            if A is not None:
                exact, g = g @ torch.linalg.inv(A @ A.T) / 9, projected(g, A, torch.tensor(3.0))
                assert (g - exact).norm() < 0.03 * exact.norm()  # the product is in bfloat16
            mean, square, t = 0.9 * mean + 0.1 * g, 0.999 * square + 0.001 * g**2, step + 1
            value = value - 1e-2 * (1 - 0.999**t) ** 0.5 / (1 - 0.9**t) * mean / (square.sqrt() + 1e-6)
            value = value * (1 - 1e-2 * 0.1)
        torch.testing.assert_close(found[key], value)


@cases("linear")
def test_lorafa_resumes_from_its_state(case):
    runs = []
    for interrupted in (False, True):
        model = holder(case)
        optimizer = lorafa(optimizers, model)
        parameters = optimizer.param_groups[0]["params"]
        for step in range(STEPS):
            if interrupted and step == 2:
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = lorafa(optimizers, model)
                optimizer.load_state_dict(state)
            for i, p in enumerate(parameters):
                p.grad = given(str(i), p.shape, step)
            optimizer.step()
        runs.append([p.detach().clone() for p in parameters])
    assert all(map(torch.equal, *runs))


@cases("linear")
def test_training_goes_down_and_the_scheduler_works(case):
    for make in (loraplus, lorafa, lambda lib, m: riemannian(lib, m, torch.optim.AdamW)):
        model = holder(case)
        optimizer = make(optimizers, model)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=4)
        losses = []
        for _ in range(4):
            optimizer.zero_grad()
            loss = model(**inputs("biased_llama"), labels=inputs("biased_llama")["input_ids"]).loss
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]


@cases("linear")
def test_refusals(case):
    model = holder(case)
    for library, m in ((peft.optimizers, case[1]), (optimizers, model)):
        with pytest.raises(ValueError, match="closure|losses in its steps"):
            library.create_riemannian_optimizer(m, torch.optim.LBFGS, lr=1.0)
        with pytest.raises(TypeError, match="optimizer_cls"):
            library.create_riemannian_optimizer(m, dict, lr=1.0)
        with pytest.raises(ValueError, match="closure"):
            riemannian(library, m).step(lambda: 0.0)
        with pytest.raises(ValueError, match="use_rslora"):
            lorafa(library, m, use_rslora=True)
        with pytest.warns(FutureWarning, match="use_rslora"):
            lorafa(library, m, use_rslora=False)
    with pytest.raises(ValueError, match="nothing to precondition"):  # lorafa has frozen A
        riemannian(optimizers, model)
    with pytest.raises(TypeError, match="expected a PeftModel"):
        loraplus(optimizers, model_of("bert"))
    experts = peft_fx.get_peft_model(
        model_of("mixtral"), peft_fx.LoraConfig(target_parameters=["experts.down_proj"], target_modules=[])
    )
    with pytest.raises(ValueError, match="not of expert"):
        lorafa(optimizers, experts)
    embedded = peft_fx.get_peft_model(model_of("biased_llama"), peft_fx.LoraConfig(target_modules=["embed_tokens"]))
    with pytest.warns(UserWarning, match="B learns nothing"):
        lorafa(optimizers, embedded)


def test_without_warnings_where_there_is_nothing_to_warn_of():
    model = peft_fx.get_peft_model(model_of("biased_llama"), peft_fx.LoraConfig(target_modules=["q_proj"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for make in (loraplus, lorafa):
            make(optimizers, model)
