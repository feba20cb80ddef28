"""`inject_adapter_in_model`: the model stays what it is, and its state dict holds the adapters."""

import copy

import peft
import pytest
import torch
from graphs import inputs, model_of

import peft_fx
from peft_fx import functional
from peft_fx.hf.model.injection import remove_adapter

LORA = dict(r=4, lora_alpha=32, target_modules=["q_proj", "down_proj"], init_lora_weights=False)


def logits(model):
    return model(**inputs("tied_llama")).logits


@pytest.fixture
def injected():
    torch.manual_seed(0)
    return peft_fx.inject_adapter_in_model(peft_fx.LoraConfig(**LORA), model_of("tied_llama").eval())


def test_the_model_is_the_same_object_and_its_numbers_are_pefts(injected):
    reference = peft.inject_adapter_in_model(peft.LoraConfig(**LORA), model_of("tied_llama").eval())
    tensors = peft_fx.get_peft_model_state_dict(injected)
    assert tensors.keys() == peft.get_peft_model_state_dict(reference).keys()
    peft.set_peft_model_state_dict(reference, tensors)
    torch.testing.assert_close(logits(injected), logits(reference))
    logits(injected).square().mean().backward()
    trained = [n for n, p in injected.named_parameters() if p.requires_grad]
    assert trained and all(n.startswith("peft_adapters.default.") for n in trained)
    assert all(p.grad is not None for n, p in injected.named_parameters() if n in trained)
    found, expected = (lib.get_model_status(m) for lib, m in ((peft_fx, injected), (peft, reference)))
    assert (
        found.trainable_params == expected.trainable_params and found.num_adapter_layers == expected.num_adapter_layers
    )
    other = model_of("tied_llama").eval()
    torch.manual_seed(1)
    again = peft_fx.inject_adapter_in_model(peft_fx.LoraConfig(**LORA), other)
    assert not torch.equal(logits(again), logits(injected))
    peft_fx.set_peft_model_state_dict(again, tensors)
    assert torch.equal(logits(again), logits(injected))


def test_copies_state_dicts_and_devices(injected):
    before = logits(injected)
    copied = copy.deepcopy(injected)
    assert torch.equal(logits(copied), before)
    copied.load_state_dict({k: 0 * v if "lora_B" in k else v for k, v in copied.state_dict().items()})
    torch.testing.assert_close(logits(copied), logits(model_of("tied_llama").eval()))
    assert torch.equal(logits(injected), before)
    assert {p.dtype for p in copied.double().parameters()} == {torch.float64} and logits(copied).dtype == torch.float64


def test_several_adapters_and_the_functional_api(injected):
    before = logits(injected)
    peft_fx.inject_adapter_in_model(peft_fx.LoraConfig(**LORA), injected, adapter_name="other")
    other = logits(injected)
    assert not torch.equal(other, before)
    functional.set_adapter(injected, "default")
    assert torch.equal(logits(injected), before)
    assert functional.delete_adapter(injected, "default") == ["other"]
    assert torch.equal(logits(injected), other)
    assert not any("default" in name for name in injected.state_dict())


def test_targets_from_the_keys_of_a_state_dict(injected):
    tensors = {k: v for k, v in peft_fx.get_peft_model_state_dict(injected).items() if "q_proj" in k}
    with pytest.warns(RuntimeWarning, match="inconsistency"):
        model = peft_fx.inject_adapter_in_model(
            peft_fx.LoraConfig(**LORA), model_of("tied_llama").eval(), state_dict=tensors
        )
    assert peft_fx.get_peft_model_state_dict(model).keys() == tensors.keys()
    with pytest.raises(ValueError, match="no such module"):
        peft_fx.inject_adapter_in_model(
            peft_fx.LoraConfig(**LORA), model_of("tied_llama"), state_dict={"x.lora_A.weight": 0}
        )


def test_a_swap(injected, tmp_path):
    other = peft_fx.get_peft_model(model_of("tied_llama").eval(), peft_fx.LoraConfig(**{**LORA, "r": 2})).eval()
    other.save_pretrained(tmp_path)
    compiled = torch.compile(injected, backend="aot_eager", fullgraph=True)
    compiled(**inputs("tied_llama"))
    with torch.compiler.set_stance("fail_on_recompile"):
        peft_fx.hotswap_adapter(injected, tmp_path, "default")
        found = compiled(**inputs("tied_llama")).logits
    torch.testing.assert_close(found, logits(other))


def test_a_forward_sets_the_scale_of_what_it_calls_next(injected):
    """As diffusers' models do for `scale` among their arguments; nobody's forward waits for itself."""
    once = logits(injected)
    layers = [m for m in injected.modules() if hasattr(m, "scale_layer")]

    def scale(factor):
        for layer in layers:
            layer.scale_layer(factor)

    before = injected.model.layers[0].register_forward_pre_hook(lambda *_: scale(0.5))
    after = injected.model.layers[0].register_forward_hook(lambda *_: scale(2.0))
    inside = logits(injected)
    before.remove(), after.remove()
    scale(0.5)
    assert len(layers) == 2 and torch.equal(logits(injected), inside) and not torch.equal(inside, once)
    scale(2.0)
    assert torch.equal(logits(injected), once)


def test_taken_away_the_model_is_as_it_was(injected):
    plain = model_of("tied_llama").eval()
    remove_adapter(injected, "default")
    assert injected.state_dict().keys() == plain.state_dict().keys() and not hasattr(injected, "peft_config")
    assert torch.equal(logits(injected), logits(plain)) and type(injected.lm_head) is type(plain.lm_head)
    peft_fx.inject_adapter_in_model(peft_fx.LoraConfig(**LORA), injected)
    assert not torch.equal(logits(injected), logits(plain))


def test_a_swap_takes_keys_that_name_the_adapter(injected):
    """As diffusers gives them."""
    before = logits(injected)
    tensors = peft_fx.get_peft_model_state_dict(injected)
    named = {k.replace(".weight", ".default.weight"): 2 * t for k, t in tensors.items()}
    peft_fx.hotswap_adapter_from_state_dict(injected, named, "default", peft_fx.LoraConfig(**LORA))
    after = logits(injected)
    peft_fx.set_peft_model_state_dict(injected, {k: t / 2 for k, t in tensors.items()})
    assert torch.equal(logits(injected), before) and not torch.equal(after, before)
