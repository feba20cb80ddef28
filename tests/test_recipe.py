"""Recipes: all the forms in which a user may bring one, and clear errors for what is none."""

import dataclasses
import json

import peft
import pytest

from peft_fx.errors import RecipeError
from peft_fx.methods.lora import LoraConfig
from peft_fx.peft_types import TaskType
from peft_fx.recipe import Recipe, as_recipe

CONFIG = LoraConfig(r=4, lora_alpha=16, target_modules=["k", "q"], rank_pattern={"q": 2}, task_type="CAUSAL_LM")
TWO = Recipe({"zebra": CONFIG, "ant": LoraConfig()})


@dataclasses.dataclass
class LooksLikePeft:
    peft_type: str = "LORA"

    def to_dict(self):
        return {"r": 4, "target_modules": {"k"}, "runtime_config": {"ephemeral_gpu_offload": False}}


FORMS = {
    "config": CONFIG,
    "recipe": Recipe({"default": CONFIG}),
    "dict": CONFIG.to_dict(),
    "lower_case": {**CONFIG.to_dict(), "peft_type": "lora"},
    "adapters": {"adapters": {"default": CONFIG.to_dict()}},
    "adapters_of_configs": {"adapters": {"default": CONFIG}},
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_form_gives_the_same_recipe(form):
    assert as_recipe(form) == Recipe({"default": CONFIG})


def test_a_config_of_peft_is_taken_without_its_classes():
    options = {"r": 4, "lora_alpha": 16, "rank_pattern": {"q": 2}, "task_type": "CAUSAL_LM"}
    theirs = peft.LoraConfig(target_modules={"q", "k"}, **options)
    recipe = as_recipe(theirs, "mine")
    assert recipe["mine"] == dataclasses.replace(CONFIG, peft_version=theirs.peft_version)
    assert type(recipe["mine"].task_type) is TaskType and type(recipe["mine"].to_dict()["task_type"]) is str
    assert as_recipe(LooksLikePeft())["default"] == LoraConfig(r=4, target_modules=["k"])


def test_the_order_of_adapters_is_kept_through_json():
    again = Recipe.from_dict(json.loads(TWO.to_json()))
    assert again == TWO and list(again) == ["zebra", "ant"] and len(again) == 2


def test_a_recipe_cannot_be_changed():
    adapters = {"a": CONFIG}
    recipe = Recipe(adapters)
    adapters["b"] = CONFIG
    assert list(recipe) == ["a"]
    with pytest.raises(TypeError):
        recipe.adapters["c"] = CONFIG
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.adapters = {}


YAML = "adapters:\n  one: {peft_type: LORA, r: 4}\n  two: {peft_type: LORA, target_modules: [q]}\n"


@pytest.mark.parametrize("name, text", [("r.json", TWO.to_json()), ("r.yaml", YAML), ("r.yml", YAML)])
def test_files_are_read(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    expected = TWO if name == "r.json" else Recipe({"one": LoraConfig(r=4), "two": LoraConfig(target_modules=["q"])})
    assert as_recipe(tmp_path / name) == as_recipe(str(tmp_path / name)) == expected


def test_an_adapter_folder_is_a_recipe(tmp_path):
    peft.LoraConfig(r=4, target_modules=["q"]).save_pretrained(tmp_path)
    assert as_recipe(tmp_path, "mine")["mine"].r == 4


def test_yaml_cannot_make_objects(tmp_path):
    (tmp_path / "r.yaml").write_text("!!python/object/apply:os.mkdir [executed]")
    with pytest.raises(RecipeError, match="not valid yaml"):
        as_recipe(tmp_path / "r.yaml")


NO_RECIPES = [
    (5, "expected a config"), (None, "expected a config"), ({}, "names its peft_type"),
    ({"r": 4}, "names its peft_type"), ({"peft_type": "NOPE"}, "'NOPE' is unknown"),
    ({"adapters": {}}, "at least one adapter"), ({"adapters": []}, "at least one adapter"),
    ({"adapters": {"a": CONFIG}, "extra": 1}, "unknown keys ['extra']"), ({"adapters": {"a": 5}}, "expected a config"),
    ({"peft_type": "TOKENS"}, "is unknown"), ("missing.json", "cannot be read"), ("a.txt", "expected one of .json"),
]  # fmt: skip


@pytest.mark.parametrize("obj, says", NO_RECIPES, ids=lambda v: str(v)[:40])
def test_what_is_no_recipe_is_an_error(obj, says):
    with pytest.raises(RecipeError) as error:
        as_recipe(obj)
    assert says in str(error.value)


@pytest.mark.parametrize("name, text", [("r.json", "{"), ("r.yaml", "a: [1"), ("r.json", "[1]"), ("r.yaml", "5")])
def test_a_file_that_is_no_recipe_is_named_in_the_error(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(RecipeError, match=name):
        as_recipe(tmp_path / name)
