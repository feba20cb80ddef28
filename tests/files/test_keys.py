"""Keys of older files: what has been renamed since is found under its name of today, and nothing else is touched."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
)

import peft_fx
from peft_fx.files.keys import of_method, of_model
from peft_fx.planning.modules import module_table
from peft_fx.target import ModuleRecord, ModuleTable, Renaming

# Methods that PEFT has renamed


class Ages(nn.Module):
    """Its modules begin as the keys of an old method's tensors did."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.bone_age, self.bone_head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.bone_head(self.bone_age(self.body(x)))


AGES = {
    "a target": peft_fx.LoraConfig(r=2, target_modules=["bone_age"], init_lora_weights=False),
    "a saved module": peft_fx.LoraConfig(r=2, target_modules=["body"], modules_to_save=["bone_head"]),
    "biases": peft_fx.LoraConfig(r=2, target_modules=["bone_age"], bias="all", init_lora_weights=False),
    "MiSS": peft_fx.MissConfig(r=2, target_modules=["bone_age"], init_weights=False),
    "IA3": peft_fx.IA3Config(target_modules=["bone_age"], feedforward_modules=[], init_ia3_weights=False),
}


@pytest.mark.parametrize("case", AGES)
def test_modules_that_are_called_as_an_old_methods_tensors_keep_their_names(tmp_path, case):
    x = torch.randn(2, 6)
    model = peft_fx.get_peft_model(Ages().eval(), AGES[case]).eval()
    model.save_pretrained(tmp_path)
    read = peft_fx.PeftModel.from_pretrained(Ages(), tmp_path).eval()
    torch.testing.assert_close(read(x), model(x))
    peft_fx.hotswap_adapter(model, tmp_path, "default")
    graph = peft_fx.load_adapter(peft_fx.capture(Ages().eval(), (x,)), tmp_path)
    torch.testing.assert_close(graph(x), model(x))


def test_a_file_of_the_old_method_is_renamed_at_its_keys_ends_alone(tmp_path):
    config = peft_fx.MissConfig(r=2, target_modules=["bone_age"], modules_to_save=["bone_head"], init_weights=False)
    model = peft_fx.get_peft_model(Ages().eval(), config).eval()
    model.save_pretrained(tmp_path)
    file, path = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    data = json.loads(file.read_text())
    old = {k: v for k, v in data.items() if k not in ("mini_r", "miss_dropout")}
    file.write_text(json.dumps(old | {"peft_type": "BONE"}))
    tensors = {k.replace("miss_block", "bone_block"): t for k, t in load_file(path).items()}
    assert "base_model.model.bone_age.bone_block" in tensors
    save_file(tensors, path, metadata={"format": "pt"})
    x = torch.randn(2, 6)
    torch.testing.assert_close(peft_fx.PeftModel.from_pretrained(Ages(), tmp_path).eval()(x), model(x))
    assert of_method({"m.bone_block": 1}, "LORA") == {"m.bone_block": 1}


# Modules that transformers has renamed

TEXT = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
EYE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 8, "patch_size": 4,
}  # fmt: skip


def llava():
    config = LlavaConfig(text_config=LlamaConfig(**TEXT), vision_config=CLIPVisionConfig(**EYE))
    return LlavaForConditionalGeneration(config)


def gemma3():
    return Gemma3ForConditionalGeneration(
        Gemma3Config(text_config={**TEXT, "head_dim": 8}, vision_config=EYE, mm_tokens_per_image=4)
    )


def paligemma():
    text, eye = {**TEXT, "model_type": "gemma", "head_dim": 8}, {**EYE, "model_type": "siglip_vision_model"}
    return PaliGemmaForConditionalGeneration(PaliGemmaConfig(text_config=text, vision_config=eye, projection_dim=32))


def base(kind):
    torch.manual_seed(0)
    return kind().eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(1, 11)[None]).logits


def former(key):
    """As it was called before transformers 4.52."""
    key = key.replace("base_model.model.model.language_model.", "base_model.model.language_model.model.")
    key = key.replace("base_model.model.lm_head.", "base_model.model.language_model.lm_head.")
    return key.replace("base_model.model.model.vision_tower.", "base_model.model.vision_tower.")


TARGETS = r".*language_model.*\.(q_proj|v_proj)|.*vision_tower.*\.k_proj"


def older(folder, kind, config):
    """An adapter's folder under former names, and the model that it is of."""
    model = peft.get_peft_model(base(kind), config).eval()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora" not in name:
            nn.init.normal_(parameter)
    model.save_pretrained(folder)
    path = folder / "adapter_model.safetensors"
    tensors = {former(k): t for k, t in load_file(path).items()}
    assert not tensors.keys() & load_file(path).keys()
    save_file(tensors, path, metadata={"format": "pt"})
    return model, tensors


@pytest.mark.parametrize("kind", [llava, gemma3, paligemma], ids=lambda k: k.__name__)
def test_every_way_to_load_reads_adapters_of_models_whose_modules_were_renamed(tmp_path, kind):
    config = peft.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False)
    theirs, tensors = older(tmp_path, kind, config)
    expected = logits(theirs)
    torch.testing.assert_close(logits(peft.PeftModel.from_pretrained(base(kind), tmp_path).eval()), expected)

    def fresh():
        return peft_fx.get_peft_model(base(kind), peft_fx.LoraConfig(r=2, target_modules=TARGETS)).eval()

    read = peft_fx.PeftModel.from_pretrained(base(kind), tmp_path).eval()
    added, swapped, given, memory = fresh(), fresh(), fresh(), fresh()
    added.load_adapter(tmp_path, "other")
    added.set_adapter("other")
    peft_fx.hotswap_adapter(swapped, tmp_path, "default")
    peft_fx.hotswap_adapter_from_state_dict(memory, tensors, "default", config)
    result = peft_fx.set_peft_model_state_dict(given, tensors)
    assert not result.missing_keys and not result.unexpected_keys
    for model in (read, added, swapped, memory, given):
        torch.testing.assert_close(logits(model), expected)
    read.save_pretrained(tmp_path / "new")
    assert load_file(tmp_path / "new" / "adapter_model.safetensors").keys() == {
        k for k in peft.get_peft_model_state_dict(theirs)
    }


@pytest.mark.parametrize("config", [
    peft.LoHaConfig(r=2, target_modules=TARGETS, init_weights=False),
    peft.LoraConfig(r=2, target_modules=TARGETS, modules_to_save=["lm_head"], init_lora_weights=False),
], ids=["another method", "a saved head"])  # fmt: skip
def test_so_are_other_methods_and_saved_modules(tmp_path, config):
    theirs, _ = older(tmp_path, llava, config)
    torch.testing.assert_close(logits(peft_fx.PeftModel.from_pretrained(base(llava), tmp_path)), logits(theirs))


@pytest.mark.slow
def test_a_graph_knows_the_former_names_too(tmp_path):
    older(tmp_path, llava, peft.LoraConfig(r=2, target_modules=r".*language_model.*\.q_proj", init_lora_weights=False))
    text = base(llava)
    graph = peft_fx.capture(text, kwargs={"input_ids": torch.arange(1, 11)[None]})
    peft_fx.export(graph, tmp_path / "model.pt2")
    expected = logits(peft_fx.PeftModel.from_pretrained(text, tmp_path))
    for found in (graph, peft_fx.load(tmp_path / "model.pt2")):
        torch.testing.assert_close(logits(peft_fx.load_adapter(found, tmp_path)), expected)


def test_key_mapping_comes_before_the_models_own_names(tmp_path):
    theirs, tensors = older(tmp_path, llava, peft.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False))
    path = tmp_path / "adapter_model.safetensors"
    mine = {k.replace("language_model", "my_text"): t for k, t in tensors.items()}
    save_file(mine, path, metadata={"format": "pt"})
    mapping = {"^my_text": "language_model"}
    read = peft_fx.PeftModel.from_pretrained(base(llava), tmp_path, key_mapping=mapping)
    torch.testing.assert_close(logits(read), logits(theirs))


def test_a_name_that_the_model_has_stays_and_an_unknown_one_does_too():
    paths = ("", "old", "old.layer", "new", "new.layer", "new.other")
    records = tuple(ModuleRecord(path, "Linear", ("Linear",)) for path in paths)
    table = ModuleTable(records, renamings=(Renaming("^old", "new"), Renaming("^text", "new", ("new.", ""))))
    prefix = "base_model.model."
    given = {"old.layer.lora_A.weight": "old.layer", "old.other.lora_A.weight": "new.other", "text.other.x": "new.other",
             "old.nothing.lora_A.weight": "old.nothing"}  # fmt: skip
    found = of_model({prefix + key: key for key in given}, table)
    assert {key.removeprefix(prefix): old for key, old in found.items()} == {
        new + key[key.index(".", key.index(".") + 1) :]: key for key, new in given.items()
    }
    assert ModuleTable.from_json(json.loads(json.dumps(table.to_json()))) == table


def test_models_that_are_not_transformers_have_no_former_names():
    assert module_table(Ages()).renamings == ()
