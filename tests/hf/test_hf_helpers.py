"""PEFT's helpers, and its functions that choose what acts and trains, beside PEFT's own."""

import copy
import importlib
import inspect
import warnings

import peft
import peft.helpers
import pytest
import torch
from beside_peft import both, logits
from graphs import captured, inputs, model_of
from torch import nn

import peft_fx
from peft_fx import helpers


def test_signatures_are_the_models(tmp_path):
    _, model = both(tmp_path)
    base = type(model.get_base_model())
    with pytest.raises(ValueError, match="expected one of"):
        helpers.update_signature(model, "call")
    expected, tokens = logits(model), dict(max_new_tokens=3, do_sample=False, pad_token_id=0)
    generated = model.generate(**inputs("biased_llama"), **tokens)
    helpers.update_signature(model)
    for name in ("forward", "generate"):
        mine, theirs = getattr(model, name), getattr(base, name)
        assert [*inspect.signature(mine).parameters] == [*inspect.signature(theirs).parameters][1:]
        assert mine.__doc__ == theirs.__doc__
    assert torch.equal(logits(model), expected)
    assert torch.equal(model.generate(**inputs("biased_llama"), **tokens), generated)
    other = copy.deepcopy(model)  # whose methods are its own
    assert other.generate.__self__ is other and other.forward.__self__ is other
    bare = peft_fx.get_peft_model(nn.Sequential(nn.Linear(4, 4)), peft_fx.LoraConfig(target_modules=["0"]))
    helpers.update_signature(bare)  # no generate: nothing happens to it
    assert not hasattr(bare.get_base_model(), "generate")


def test_an_adapter_is_known_by_its_config(tmp_path):
    both(tmp_path / "adapter")
    for folder in (tmp_path / "adapter", tmp_path, tmp_path / "nowhere"):
        assert helpers.check_if_peft_model(folder) == peft.helpers.check_if_peft_model(str(folder))


@pytest.mark.parametrize("config", [{}, dict(use_rslora=True, rank_pattern={"v_proj": 2}), dict(use_dora=True)])
def test_scales_are_changed_inside_the_block_only(tmp_path, config):
    reference, model = both(tmp_path, **config)
    before = logits(model)
    for multiplier in (0, 0.5, 3):
        with (
            helpers.rescale_adapter_scale(model, multiplier),
            peft.helpers.rescale_adapter_scale(reference, multiplier),
        ):
            torch.testing.assert_close(logits(model), logits(reference))
            assert not torch.equal(logits(model), before)
        assert torch.equal(logits(model), before)
    with pytest.raises(ZeroDivisionError), helpers.rescale_adapter_scale(model, 3):
        1 / 0  # noqa: B018
    assert torch.equal(logits(model), before)


@pytest.mark.slow
def test_scales_of_graphs_and_backends(tmp_path):
    _, model = both(tmp_path)
    graph = peft_fx.load_adapter(captured("biased_llama"), tmp_path)
    base = model_of("biased_llama")
    backend = peft_fx.backend(tmp_path, model=base)
    compiled = torch.compile(base, backend=backend)
    with helpers.rescale_adapter_scale(model, 0.3):
        expected = logits(model)
    for holder, called in ((graph, graph), (backend, compiled)):
        before = logits(called)
        with helpers.rescale_adapter_scale(holder, 0.3), torch.compiler.set_stance("fail_on_recompile"):
            torch.testing.assert_close(logits(called), expected)
        assert torch.equal(logits(called), before)
    with pytest.raises(TypeError, match="multiplier"), helpers.rescale_adapter_scale(model, "1"):
        pass
    other = peft_fx.get_peft_model(
        model_of("bert"), peft_fx.IA3Config(target_modules=["query"], feedforward_modules=[])
    )
    with pytest.raises(ValueError, match="no LoRA adapter"), helpers.rescale_adapter_scale(other, 1):
        pass


def test_switches_that_have_nothing_to_switch(tmp_path):
    reference, model = both(tmp_path, use_dora=True)
    caching = helpers.DoraCaching()
    caching(enabled=False)
    with caching, helpers.disable_input_dtype_casting(model), helpers.disable_input_dtype_casting(model, active=False):
        torch.testing.assert_close(logits(model), logits(reference))


def test_labels_are_shifted_as_in_peft():
    labels = torch.tensor([[5, 6, -100], [7, 8, 9]])
    assert torch.equal(peft_fx.shift_tokens_right(labels, 0, 2), peft.shift_tokens_right(labels, 0, 2))
    with pytest.raises(ValueError, match="pad_token_id"):
        peft_fx.shift_tokens_right(labels, None, 2)


@pytest.mark.parametrize("name", ["llama", "mixtral", "tied_llama"])
def test_kappa_chooses_what_peft_chooses(name):
    model = model_of(name)
    for options in ({}, {"top_p": 0.5}, {"max_dim_size_to_analyze": 20}):
        found = peft_fx.find_kappa_target_modules(model, show_progress=False, **options)
        assert found == peft.find_kappa_target_modules(model, show_progress=False, **options)
    mine, theirs = (library.KappaTuneSelector(model, show_progress=False) for library in (helpers, peft.helpers))
    for options in ({"num_modules": 3}, {"threshold": 20.0}, {}):
        assert mine.get_best_targets(**options) == theirs.get_best_targets(**options)
        assert mine.get_best_target_parameters(**options) == theirs.get_best_target_parameters(**options)
    packed = nn.Linear(4, 4)
    packed.weight = nn.Parameter(packed.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="packed by a quantisation"):
        peft_fx.find_kappa_target_modules(nn.Sequential(packed), show_progress=False)


def test_adapters_act_train_and_go_as_in_peft(tmp_path):
    models = both(tmp_path, adapters=("default", "other"), modules_to_save=["lm_head"])
    reference, model = models
    with torch.no_grad():
        torch.manual_seed(0)
        for n, p in reference.named_parameters():
            if ".other" in n:
                p.add_(0.1 * torch.randn_like(p))
    peft_fx.set_peft_model_state_dict(
        model, peft.get_peft_model_state_dict(reference, adapter_name="other"), adapter_name="other"
    )

    def trains(m):
        return {n for n in ("default", "other") for k, p in m.named_parameters() if f".{n}" in k and p.requires_grad}

    for name, options in (("other", {}), ("default", {"inference_mode": True}), (["other"], {})):
        for library, m in ((peft, reference), (peft_fx, model)):
            importlib.import_module(f"{library.__name__}.functional").set_adapter(m, name, **options)
        torch.testing.assert_close(logits(model), logits(reference))
        assert trains(model) == trains(reference)
    for names, flag in ((["default", "other"], True), ("default", False)):
        for library, m in ((peft, reference), (peft_fx, model)):
            importlib.import_module(f"{library.__name__}.functional").set_requires_grad(m, names, flag)
        assert trains(model) == trains(reference)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        left = [
            importlib.import_module(f"{library.__name__}.functional").delete_adapter(m, "other", prefix="lora_")
            for library, m in ((peft, reference), (peft_fx, model))
        ]
    assert left[0] == left[1] == ["default"]
    torch.testing.assert_close(logits(model), logits(reference))
