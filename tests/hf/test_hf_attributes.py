"""What can be asked of a PeftModel: PEFT's attributes are there, or stand in a table with the reason why not."""

import inspect

import peft
import pytest
import torch
from graphs import model_of
from misuse import bare, injected, lora, mixed, one, output, saved, two
from torch import nn
from transformers import LlamaForCausalLM

import peft_fx

LEFT_OUT = {
    "base_model_prepare_inputs_for_generation": "PEFT's own record of what it puts its own in place of",
    "config": "of a bare module, which has none",
    "get_model_config": "model.config.to_dict()",
    "get_prompt": "prompt methods",
    "get_prompt_embedding_to_save": "prompt methods",
    "inject_adapter": "inject_adapter_in_model",
    "prepare_model_for_gradient_checkpointing": "done where the model checkpoints; else enable_input_require_grads()",
    "set_modules_to_save": "config.modules_to_save",
    "special_peft_forward_args": "what a call takes besides is in its signature",
    "subtract_mutated_init": "initialisers that change the base",
    "supports_lora_conversion": "conversion to LoRA",
    "target_module_mapping": "peft_fx.utils.constants has the tables",
    "tuner_layer_cls": "no layer classes",
    "uses_shared_state": "tensors are shared by any method",
}


@pytest.mark.parametrize("make", [one, mixed])
def test_a_model_has_what_pefts_has(make):
    reference, model = make(peft), make(peft_fx)
    own = {*dir(nn.Module()), *dir(bare())}
    missing = {
        name
        for theirs, ours in ((reference, model), (reference.base_model, model.base_model))
        for name in dir(theirs)
        if not name.startswith("_") and name not in own and not hasattr(ours, name)
    }
    assert missing <= LEFT_OUT.keys()


def test_no_attribute_is_left_out_that_is_there():
    models = [m for make in (one, mixed) for m in (make(peft_fx), make(peft_fx).base_model)]
    assert not [name for name in LEFT_OUT if all(hasattr(m, name) for m in models)]


def llama(lib):
    config = lib.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    return lib.get_peft_model(model_of("tied_llama"), config)


THINGS = {
    "of a task": llama,
    "mixed": mixed,
    "tuner": lambda lib: one(lib).base_model,
    "auto": lambda lib: lib.AutoPeftModel,
    "config": lora,
}


def arguments(function):
    return [name for name in inspect.signature(function).parameters if name not in ("self", "cls", "kwargs", "args")]


def methods(thing):
    """Name -> function, of those that a thing has besides those of any module, and of the model in it."""
    common = {*dir(nn.Module), *dir(LlamaForCausalLM)} - {"load_adapter", "add_adapter", "set_adapter"}
    common |= {"push_to_hub"} if not hasattr(thing, "peft_config") else set()
    names = [n for n in dir(thing) if not n.startswith("_") and n not in common]
    return {n: f for n in names if callable(f := getattr(thing, n)) and not isinstance(f, type)}


@pytest.mark.parametrize("name", THINGS)
def test_methods_take_pefts_arguments_in_pefts_order(name):
    theirs, ours = (THINGS[name](library) for library in (peft, peft_fx))
    others = []
    for method, function in methods(theirs).items():
        if method not in LEFT_OUT:
            wanted, found = arguments(function), arguments(getattr(ours, method))
            if found[: len(wanted)] != wanted and found[-2:] != ["options", "named"]:
                others.append((method, wanted, found))
    assert others == []


def test_adapters_are_disabled_and_enabled_in_place():
    for lib in (peft, peft_fx):
        model = one(lib)
        before = output(model)
        model.base_model.disable_adapter_layers()
        assert torch.equal(output(model), output(bare()))
        model.base_model.enable_adapter_layers()
        assert torch.equal(output(model), before)
        assert model.base_model.targeted_module_names == ["layers.0.q", "layers.0.v", "layers.1.q", "layers.1.v"]
        assert model.peft_type == "LORA" and model.has_active_enabled_adapter and model.modules_to_save is None
        assert model.base_model.active_adapter == ["default"]


def test_an_adapter_is_a_line_of_the_models_text():
    lines = [line.strip() for line in repr(two(peft_fx)).splitlines()]
    ends = "on 4 targets (layers.0.q.weight ... layers.1.v.weight)"
    assert f"(default): LORA, acts, {ends}, 256 parameters, 256 trainable" in lines
    assert f"(other): LORA, does not act, {ends}, 128 parameters, 0 trainable" in lines
    assert "(peft_adapters): Adapters(default)" in repr(injected(peft_fx))


@pytest.mark.filterwarnings("ignore")
def test_what_is_trained_after_adapters_came_and_went(tmp_path):
    def steps(lib):
        model = two(lib)
        yield
        model.add_adapter("third", lora(lib))
        yield model
        model.load_adapter(saved(tmp_path / lib.__name__), "fourth", is_trainable=True)
        yield model
        model.delete_adapter("default")
        yield model
        model.set_adapter("third")
        yield model

    for reference, ours in zip(steps(peft), steps(peft_fx), strict=True):
        if ours is not None:
            assert ours.get_model_status().requires_grad == reference.get_model_status().requires_grad
