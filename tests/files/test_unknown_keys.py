"""Keys of a config file that this version does not know: left out with a warning that names them, wherever files are read."""

import json
from dataclasses import dataclass

import peft
import pytest
import torch
from graphs import captured, inputs, model_of, output
from lora_files import table_of
from safetensors.torch import save_file

import peft_fx
from peft_fx import RecipeError
from peft_fx.files.read import read_adapter
from peft_fx.hf.compat.helpers import check_if_peft_model
from peft_fx.recipe import as_config, as_recipe

NAME = "biased_llama"
LORA = dict(r=4, target_modules=["q_proj"], init_lora_weights=False)
# who wrote them -> the keys with a value, which are named, and those without
KEYS = {
    "another program": ({"swift_type": "LORA", "lorap_lr_ratio": 16.0}, {"lora_dtype": None}),
    "a newer PEFT": ({"new_group_size": 16, "new_mode": "standard"}, {"new_flag": False}),
    "an older PEFT": ({"enable_lora": [True], "merge_weights": True}, {"fine": {}}),
}


def written(folder, keys):
    """PEFT's model and its files, with further keys in the config."""
    torch.manual_seed(0)
    model = peft.get_peft_model(model_of(NAME), peft.LoraConfig(**LORA))
    model.save_pretrained(folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    return model.eval()


def loaded(folder):
    return peft_fx.PeftModel.from_pretrained(model_of(NAME), folder).eval()(**inputs(NAME)).logits


def loaded_as_another(folder):
    model = peft_fx.get_peft_model(model_of(NAME), peft_fx.LoraConfig(**LORA))
    model.load_adapter(folder, "other")
    model.set_adapter("other")
    return model.eval()(**inputs(NAME)).logits


def swapped(folder):
    graph = peft_fx.apply(captured(NAME), {"peft_type": "LORA", **LORA})
    peft_fx.hotswap(graph, folder)
    return output(graph, NAME)


READERS = {"from_pretrained": loaded, "load_adapter": loaded_as_another, "hotswap": swapped,
           "of a graph": lambda folder: output(peft_fx.load_adapter(captured(NAME), folder), NAME)}  # fmt: skip


CASES = [("another program", reader) for reader in READERS] + [
    (w, "from_pretrained") for w in KEYS if w != "another program"
]


@pytest.mark.parametrize("writer, reader", CASES)
def test_an_adapter_with_keys_that_nobody_knows_is_read_without(writer, reader, tmp_path):
    named, empty = KEYS[writer]
    reference = written(tmp_path, named | empty)
    with pytest.warns(UserWarning, match=f"does not know {', '.join(sorted(named))}, which"):
        logits = READERS[reader](tmp_path)
    torch.testing.assert_close(logits, reference(**inputs(NAME)).logits)


@pytest.mark.parametrize(
    "read", [peft_fx.PeftConfig.from_pretrained, check_if_peft_model, as_recipe], ids=lambda f: f.__name__
)
def test_a_config_with_such_keys_is_read(read, tmp_path):
    written(tmp_path, {"from_the_future": 3})
    with pytest.warns(UserWarning, match="does not know from_the_future"):
        assert read(tmp_path)


def test_the_metadata_of_a_file_of_diffusers_may_have_such_keys(tmp_path):
    query = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    factors = {f"{query}.lora_A.weight": (2, 16), f"{query}.lora_B.weight": (16, 2)}
    metadata = {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.from_the_future": 3})}
    save_file({key: torch.ones(shape) for key, shape in factors.items()}, tmp_path / "a.safetensors", metadata)
    with pytest.warns(UserWarning, match="does not know from_the_future"):
        config, _ = read_adapter(tmp_path / "a.safetensors", table_of("unet"))
    assert config.r == 2


def test_what_somebody_typed_is_an_error(tmp_path):
    (tmp_path / "recipe.json").write_text('{"peft_type": "LORA", "rank": 8}')
    for typed in ({"peft_type": "LORA", "rank": 8}, tmp_path / "recipe.json"):
        with pytest.raises(RecipeError, match="unknown config field 'rank' = 8; did you mean 'r'?"):
            as_recipe(typed)


def test_a_newer_pefts_config_is_taken_where_its_new_fields_are_unset():
    @dataclass
    class Newer(peft.LoraConfig):
        new_group_size: int = 16

    assert as_config(Newer(r=4)).r == 4
    with pytest.raises(RecipeError, match="new_group_size"):
        as_config(Newer(r=4, new_group_size=8))
