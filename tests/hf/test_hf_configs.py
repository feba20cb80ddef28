"""`peft_config`: the caller's own object in one dict, filled in; edits and pops do what they do in PEFT."""

import copy
import json

import peft
import pytest
import torch
from graphs import model_of

import peft_fx

LIBRARIES = [peft_fx, peft]


def wrapped(library, **options):
    config = library.LoraConfig(init_lora_weights=False, **options)
    return library.get_peft_model(model_of("llama"), config), config


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_callers_object_lives_in_one_dict_and_is_filled_in(library):
    model = model_of("llama")
    model.name_or_path = model.config._name_or_path = "org/base"
    config = library.LoraConfig(task_type="SEQ_CLS")
    tuned = library.get_peft_model(model, config, revision="r1")
    configs = tuned.peft_config
    assert configs["default"] is config and tuned.active_peft_config is config
    assert sorted(config.target_modules) == ["q_proj", "v_proj"]
    assert (config.base_model_name_or_path, config.revision) == ("org/base", "r1")
    other = library.LoraConfig(r=2, target_modules=["q_proj"])
    tuned.add_adapter("other", other)
    assert tuned.peft_config is configs is tuned.base_model.peft_config and configs["other"] is other
    tuned.delete_adapter("other")
    assert list(configs) == ["default"]


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_config_that_a_file_is_read_with_lives_on(library, tmp_path):
    tuned, config = wrapped(library)
    tuned.save_pretrained(tmp_path)
    again = library.PeftModel.from_pretrained(model_of("llama"), tmp_path, config=config)
    assert again.peft_config["default"] is config and config.inference_mode


@pytest.mark.parametrize("library", LIBRARIES)
def test_edits_are_what_files_say_and_change_no_call(library, tmp_path):
    tuned, config = wrapped(library)
    ids = torch.arange(6).view(1, 6)
    before = tuned(ids).logits
    config.revision, config.lora_alpha, tuned.peft_config["default"].base_model_name_or_path = "r2", 99, "me/mine"
    assert torch.equal(tuned(ids).logits, before)
    tuned.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["revision"], saved["lora_alpha"], saved["base_model_name_or_path"]) == ("r2", 99, "me/mine")


@pytest.mark.parametrize("library", LIBRARIES)
def test_what_is_taken_out_is_not_saved_or_set_and_its_name_is_free(library, tmp_path):
    tuned, _ = wrapped(library)
    tuned.add_adapter("other", library.LoraConfig(r=2, target_modules=["q_proj"]))
    assert tuned.peft_config.pop("other").r == 2
    tuned.save_pretrained(tmp_path)
    assert not (tmp_path / "other").exists()
    with pytest.raises(ValueError, match="other"):
        tuned.set_adapter("other")
    again = library.LoraConfig(r=3, target_modules=["q_proj"])
    tuned.add_adapter("other", again)
    tuned.set_adapter("other")
    assert tuned.peft_config["other"] is again and tuned.active_adapter == "other"


def test_a_refused_config_is_left_as_it_was():
    config = peft_fx.LoraConfig(target_modules=["nowhere"], task_type="SEQ_CLS")
    before = copy.deepcopy(config)
    with pytest.raises(peft_fx.NoMatchingPeftModuleError):
        peft_fx.get_peft_model(model_of("llama"), config, revision="r1")
    assert config == before


def test_a_swap_is_seen_in_the_entry_and_leaves_edits(tmp_path):
    tuned, config = wrapped(peft_fx, lora_alpha=4)
    tuned.save_pretrained(tmp_path)
    tuned, config = wrapped(peft_fx, lora_alpha=16)
    config.revision = "mine"
    peft_fx.hotswap_adapter(tuned, tmp_path, "default")
    assert tuned.peft_config["default"] is config and (config.lora_alpha, config.revision) == (4, "mine")


def test_copies_have_configs_of_their_own():
    tuned, config = wrapped(peft_fx)
    other = copy.deepcopy(tuned)
    other.peft_config["default"].revision = "theirs"
    assert config.revision is None and other.peft_config["default"] is not config


def test_an_injected_config_is_the_callers():
    model, config = model_of("llama"), peft_fx.LoraConfig(target_modules=["q_proj"])
    peft_fx.inject_adapter_in_model(config, model, "a")
    assert model.peft_adapters is not None and config.target_modules == {"q_proj"}
    assert peft_fx.get_model_status(model).peft_types == {"a": "LORA"}


def test_json_that_is_no_config_is_refused_as_by_peft(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"foo": "bar"}')
    for library in LIBRARIES:
        with pytest.raises(TypeError, match="peft_type"):
            library.LoraConfig.from_pretrained(tmp_path)
    with pytest.raises(peft_fx.AdapterFileError, match="is no adapter's config.*it has the keys foo"):
        peft_fx.PeftConfig.from_pretrained(tmp_path)


def test_adapters_are_deleted_all_or_none():
    model = peft_fx.get_peft_model(
        model_of("llama"), peft_fx.LoraConfig(target_modules=["q_proj"]), adapter_name="a", mixed=True
    )
    model.add_adapter("b", peft_fx.LoraConfig(target_modules=["v_proj"]))
    model.merge_adapter(["b"])
    with pytest.raises(ValueError, match="adapter b is merged"):
        model.delete_adapter(["a", "b"])
    assert list(model.peft_config) == ["a", "b"]
    model.unmerge_adapter()
    model.delete_adapter(["a", "b", "a"])
    assert not model.peft_config


def test_vblora_of_the_largest_logits_alone_is_not_trained_on(tmp_path):
    options = {"vector_length": 4, "num_vectors": 8, "topk": 2, "target_modules": ["q_proj"]}
    config = peft_fx.VBLoRAConfig(save_only_topk_weights=True, **options)
    peft_fx.get_peft_model(model_of("llama"), config).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="largest logits .* load it for inference alone"):
        peft_fx.PeftModel.from_pretrained(model_of("llama"), tmp_path, is_trainable=True)
    model = peft_fx.PeftModel.from_pretrained(model_of("llama"), tmp_path)
    frozen = [p.requires_grad for p in model.parameters()]
    assert not any(frozen)
    with pytest.raises(RuntimeError, match="'default' holds the 2 largest logits"):
        model.base_model.set_requires_grad("default")
    with pytest.raises(RuntimeError, match="largest logits"):
        model.load_adapter(tmp_path, "default", is_trainable=True)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    for act in (model.set_adapter, model.base_model.set_adapter, layer.set_adapter, layer.set_requires_grad):
        with pytest.warns(UserWarning, match="it acts, and is not trained"):
            act("default")
        assert [p.requires_grad for p in model.parameters()] == frozen
    model.add_adapter("whole", peft_fx.VBLoRAConfig(save_only_topk_weights=True, **options))
    model.set_adapter("whole")
    assert any(p.requires_grad for p in model.parameters())
    with pytest.warns(UserWarning, match="'whole' holds .* is not trained"):  # numbers of the file's come in its place
        model.load_adapter(tmp_path, "whole")
    assert [p.requires_grad for p in model.parameters() if p.requires_grad] == []
