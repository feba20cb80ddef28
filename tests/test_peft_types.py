"""PeftType and TaskType: PEFT's members, and those of a user's methods."""

import copy
import json
import pickle

import peft

import peft_fx
from peft_fx.methods import INTERNAL, METHODS
from peft_fx.methods.base import OutputMap
from peft_fx.missing import METHODS as MISSING
from peft_fx.peft_types import OWN, PeftType, TaskType


def test_members_are_pefts():
    assert {t.value for t in PeftType} == {t.value for t in peft.PeftType}
    assert {t.value for t in TaskType} == {t.value for t in peft.TaskType}


def test_every_method_is_a_member():
    ours = {name for name, entry in METHODS.items() if isinstance(entry, tuple)} - INTERNAL
    assert ours | set(MISSING) == {t.value for t in PeftType}


def test_a_config_has_members_and_its_json_strings():
    config = peft_fx.LoraConfig(task_type="CAUSAL_LM")
    assert type(config.peft_type) is PeftType and config.peft_type.value == "LORA" == peft_fx.LoraConfig.peft_type
    assert type(config.task_type) is TaskType and config.task_type is TaskType.CAUSAL_LM
    assert config == peft_fx.LoraConfig(task_type=peft.TaskType.CAUSAL_LM)
    assert [type(config.to_dict()[name]) for name in ("peft_type", "task_type")] == [str, str]
    assert json.loads(config.to_json())["peft_type"] == "LORA"
    assert f"{config.peft_type} {config.task_type}" == "LORA CAUSAL_LM"


def test_a_method_of_ones_own_has_a_member_that_no_list_names():
    @peft_fx.method("SCALED_HERE")
    class Scaled(OutputMap):
        start: float = 1.0

    try:
        member = Scaled.Config().peft_type
        assert type(member) is PeftType and member.value == member.name == "SCALED_HERE"
        assert PeftType("SCALED_HERE") is member and member not in list(PeftType)
        assert copy.deepcopy(member) is member and pickle.loads(pickle.dumps(member)) is member
    finally:
        METHODS.pop("SCALED_HERE"), OWN.pop("SCALED_HERE")
