"""PeftModel over checkpoints that were read without their packages: adapters act, train and merge, as far as a scheme can."""

import copy

import pytest
import torch
from storage.test_native_loading import CHECKPOINTS, IDS, load, write

import peft_fx

LORA = {"target_modules": ["q_proj", "v_proj"], "r": 4, "init_lora_weights": False}
# float16 weights are rounded once more when they become dense
NAMES = {"gptq": 1e-3, "awq": 1e-3, "hqq": 1e-3, "aqlm": 1e-5, "eetq": 1e-2, "neural compressor": 1e-3}


def logits(model):
    return model(input_ids=IDS).logits


@pytest.fixture(scope="module", params=NAMES)
def tuned(request, tmp_path_factory):
    """(model in training, largest difference of its dense merge)."""
    folder = tmp_path_factory.mktemp("checkpoint")
    write(folder, *CHECKPOINTS[request.param])
    torch.manual_seed(0)
    return peft_fx.get_peft_model(load(folder), peft_fx.LoraConfig(**LORA)).train(), NAMES[request.param]


def test_adapters_act_and_train(tuned):
    model, _ = tuned
    y = logits(model)
    y.square().mean().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    with model.disable_adapter():
        assert (logits(model) - y).abs().max() > 0.1


def test_a_dense_merge_loses_nothing(tuned):
    model, close = tuned
    plain = copy.deepcopy(model).merge_and_unload(storage="dense")
    assert type(plain.model.layers[0].self_attn.q_proj).__name__ == "Linear"
    assert (logits(plain) - logits(model)).abs().max() < close


def test_a_merge_packs_again_and_back_or_says_why_not(tuned):
    model, _ = tuned
    before = logits(model)
    if "AQLM" in type(model.base_model.model.model.layers[0].self_attn.q_proj).__name__:
        with pytest.raises(peft_fx.MergeError, match="q_proj.weight: .*learnt.*storage='dense'"):
            model.merge_adapter()
        assert torch.equal(logits(model), before)
        return
    with pytest.warns(UserWarning, match="loses"):
        model.merge_adapter()
    merged = logits(model)
    assert not torch.equal(merged, before)
    assert torch.equal(logits(copy.deepcopy(model).merge_and_unload()), merged)
    model.unmerge_adapter()
    assert torch.equal(logits(model), before)
