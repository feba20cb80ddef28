"""Configs: PEFT's fields, defaults and JSON; what is refused."""

import copy
import dataclasses
import json
import math

import peft
import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from peft_fx.config import AdapterConfig, by_pattern
from peft_fx.errors import RecipeError
from peft_fx.methods.lora import LoraConfig
from peft_fx.recipe import as_recipe

PEFT_LORA = {k: list(v) if isinstance(v, set) else v for k, v in peft.LoraConfig().to_dict().items()}


def test_fields_and_defaults_are_those_of_peft():
    ours = LoraConfig().to_dict()
    assert ours.keys() == PEFT_LORA.keys()
    assert {k: v for k, v in ours.items() if v != PEFT_LORA[k]} == {"peft_version": None}


def test_a_config_round_trips_through_json():
    config = LoraConfig(lora_alpha=2.5, target_modules={"v", "q"}, layers_to_transform=(1, 2), rank_pattern={"q": 2})
    assert config.target_modules == {"q", "v"} and config.layers_to_transform == [1, 2]
    assert LoraConfig.from_dict(json.loads(config.to_json())) == config


def test_a_config_shares_nothing_with_its_dict():
    config = LoraConfig(rank_pattern={"q": 2})
    config.to_dict()["rank_pattern"]["q"] = 99
    assert config.rank_pattern == {"q": 2}


def test_unknown_fields_pass_when_empty_and_are_refused_when_set():
    assert LoraConfig.from_dict({"from_the_future": None, "also": False, "and": {}}) == LoraConfig()
    with pytest.raises(RecipeError, match="unknown config field 'from_the_future' = 3"):
        LoraConfig.from_dict({"from_the_future": 3})


REFUSED = [
    ({"r": 0}, "from 1 to"), ({"r": True}, "expected int"), ({"r": 2.0}, "expected int"),
    ({"rank_pattern": {"q": -1}}, "rank_pattern"),
    ({"lora_dropout": 1.0}, "lora_dropout"), ({"lora_dropout": -0.1}, "lora_dropout"),
    ({"loftq_config": {"loftq_bits": 4}}, "is not in this version yet"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa': PiSSA is not in this version yet"), ({"target_parameters": "experts.w"}, "target_parameters"),
    ({"modules_to_save": "head"}, "modules_to_save"), ({"target_modules": {"a": 1}}, "target_modules"),
    ({"exclude_modules": [1]}, "exclude_modules"), ({"bias": "some"}, "bias"), ({"bias": None}, "bias"),
    ({"layers_pattern": "layers"}, "without layers_to_transform"), ({"layers_to_transform": ["1"]}, "layer indices"),
    ({"target_modules": ".*q", "layers_to_transform": 1}, "cannot be combined"),
    ({"rank_pattern": ["q"]}, "expected a dict"),
]  # fmt: skip


@pytest.mark.parametrize("options, says", REFUSED, ids=lambda v: str(v))
def test_values_that_cannot_work_are_refused(options, says):
    with pytest.raises(RecipeError) as error:
        LoraConfig(**options)
    assert says in str(error.value)


WRONG_TYPES = [{"r": "8"}, {"r": None}, {"lora_alpha": "8"}, {"lora_alpha": None}, {"lora_alpha": math.nan},
               {"use_rslora": "yes"}, {"lora_dropout": True}]  # fmt: skip


@pytest.mark.parametrize("options", WRONG_TYPES, ids=str)
@pytest.mark.parametrize("make", [LoraConfig.from_dict, lambda options: LoraConfig(**options)], ids=["file", "call"])
def test_values_of_the_wrong_type_are_refused(make, options):
    with pytest.raises(RecipeError, match="expected"):
        make(options)


@pytest.mark.parametrize("init", [True, False, "gaussian"])
def test_every_initialisation_can_be_read_from_a_file(init):
    assert LoraConfig.from_dict({"init_lora_weights": init}).init_lora_weights == init


def test_none_means_no_pattern():
    assert LoraConfig(rank_pattern=None) == LoraConfig()
    assert AdapterConfig().bias == "none"


KEYS = st.sampled_from(["q", "q_proj", "layers.0.q", r"layers\.\d+\.q", ".*q", "mlp.q", "0.q"])


@given(pattern=st.dictionaries(KEYS, st.integers(1, 9), max_size=4), path=st.sampled_from(
    ["q", "layers.0.q", "model.layers.0.q", "xq", "layers.10.mlp.q", "a.q_proj", "q.x"]))  # fmt: skip
def test_patterns_are_looked_up_as_in_peft(pattern, path):
    assert by_pattern(pattern, path, 0) == pattern.get(get_pattern_key(pattern.keys(), path), 0)


def test_a_changed_config_is_checked_when_it_is_used_and_its_recipe_keeps_what_it_was():
    config = LoraConfig(target_modules=["q"])
    recipe = as_recipe(config)
    config.r = 3
    assert recipe["default"].r == 8 and as_recipe(config)["default"].r == 3
    config.r = 0
    with pytest.raises(RecipeError, match="r: expected an integer from 1"):
        as_recipe(config)


def test_pefts_ways_to_make_a_config(tmp_path):
    config = LoraConfig(r=3, peft_type="anything")
    assert config.peft_type == "LORA"
    config.save_pretrained(tmp_path, auto_mapping_dict={"base_model_class": "A"})
    data = LoraConfig.from_json_file(tmp_path / "adapter_config.json")
    assert data == config.to_dict() | {"auto_mapping": {"base_model_class": "A"}}
    (tmp_path / "with.json").write_text(json.dumps(data | {"runtime_config": {}}))
    with pytest.warns(UserWarning, match="runtime_config: is for run time"):
        assert LoraConfig.from_json_file(tmp_path / "with.json") == data
    assert AdapterConfig.from_peft_type(**data) == LoraConfig.from_dict(data)
    with pytest.warns(UserWarning, match="LoraConfig does not know newer, older"):
        assert LoraConfig.from_peft_type(r=3, newer=1, older=2) == config
    assert as_recipe(AdapterConfig(peft_type="LORA", bias="all"))["default"] == LoraConfig(bias="all")


def test_a_subclass_may_check_what_a_config_is_made_of():
    class Checked(LoraConfig):
        @classmethod
        def check_kwargs(cls, **fields):
            return fields | {"r": 2 * fields["r"]}

    assert Checked.from_dict({"r": 4}).r == 8


@pytest.mark.parametrize("value", [[], "CAUSAL", 3])
def test_a_task_that_there_is_not_is_refused(value):
    with pytest.raises(RecipeError, match="task_type=.*: expected one of SEQ_CLS"):
        LoraConfig(task_type=value)


def test_target_modules_are_a_set_in_one_order():
    config = LoraConfig(target_modules=["v", "q", "v"])
    theirs = peft.LoraConfig(target_modules=["v", "q", "v"])
    assert isinstance(config.target_modules, set) and config.target_modules == theirs.target_modules
    assert repr(config.target_modules) == "{'q', 'v'}" and json.loads(config.to_json())["target_modules"] == ["q", "v"]
    for other in (copy.deepcopy(config), dataclasses.replace(config), LoraConfig(target_modules={"v", "q"})):
        assert list(other.target_modules) == ["q", "v"] and other == config
