"""Everything that PEFT's configs can say is supported here, or answered with "not in this version yet"; typed names with a hint."""

import dataclasses
import itertools
import re
import typing

import peft
import pytest
from graphs import captured, model_of
from peft import PEFT_TYPE_TO_CONFIG_MAPPING as PEFT_CONFIGS

import peft_fx
from peft_fx import PeftFxError
from peft_fx.cli.facts import recipe_of
from peft_fx.methods import INTERNAL, METHODS, get_config
from peft_fx.missing import NAMES
from peft_fx.recipe import as_config

NOT_YET = "is not in this version yet"
PUBLIC = METHODS.keys() - INTERNAL
# what a method has to be told before it can be tried
NEEDS = {
    "ADALORA": {"total_step": 10},
    "BOFT": {"boft_block_size": 4},
    "MISS": {"r": 4},
    "PSOFT": {"r": 4},
    "TRAINABLE_TOKENS": {"token_indices": [0]},
}
# value of a field that is neither a bool, a choice nor a default: something that sets it
SOMETHING = {
    "alora_invocation_tokens": [1, 2],
    "megatron_core": None,  # only read beside megatron_config
    "qalora_group_size": None,  # only read beside use_qalora
    "runtime_config": {"ephemeral_gpu_offload": True},
    "use_bdlora": {"nblocks": 2},
} | {
    f"{name}_config": {"a": 1}
    for name in ("loftq", "eva", "corda", "lora_ga", "velora", "monteclora", "arrow", "kasa", "megatron")
}


def choices(annotation):
    """The values that an annotation lists, in a union or by themselves."""
    if typing.get_origin(annotation) is typing.Literal:
        return [re.sub(r"_\[.*\]$", "_4", v) if isinstance(v, str) else v for v in typing.get_args(annotation)]
    return [True, False] if annotation is bool else list(itertools.chain(*map(choices, typing.get_args(annotation))))


def cells():
    for peft_type, config in sorted(PEFT_CONFIGS.items()):
        if peft_type.value not in PUBLIC:
            continue
        hints = typing.get_type_hints(config)
        for f in dataclasses.fields(config):
            given = [SOMETHING[f.name]] if SOMETHING.get(f.name) is not None else []
            for value in [*given, *choices(hints[f.name])]:
                if f.name not in ("peft_type", "task_type"):
                    yield pytest.param(peft_type.value, f.name, value, id=f"{peft_type.value} {f.name}={value}")


@pytest.mark.parametrize("peft_type, field, value", list(cells()))
def test_a_choice_of_pefts_is_supported_or_said_to_be_missing(peft_type, field, value):
    config = get_config(peft_type)
    try:
        made = config(**NEEDS.get(peft_type, {}), **{field: value})
    except PeftFxError as error:
        assert (
            NOT_YET in str(error) or "makes no use of it" in str(error) or "stay where the graph has them" in str(error)
        )
    else:
        assert getattr(made, field) == value


def test_every_field_of_pefts_is_known():
    for peft_type, theirs in PEFT_CONFIGS.items():
        if peft_type.value in PUBLIC:
            ours = {f.name for f in dataclasses.fields(get_config(peft_type.value))}
            assert {f.name for f in dataclasses.fields(theirs)} - ours <= {"peft_type", "runtime_config"}


@pytest.mark.parametrize("peft_type", sorted({t.value for t in PEFT_CONFIGS} - PUBLIC))
def test_a_method_of_pefts_is_there_or_said_to_be_missing(peft_type):
    name = PEFT_CONFIGS[peft_type].__name__
    for ask in (lambda: as_config({"peft_type": peft_type}), lambda: getattr(peft_fx, name)):
        with pytest.raises((PeftFxError, AttributeError), match=NOT_YET):
            ask()


def test_every_name_of_pefts_is_there_or_said_to_be_missing():
    absent = {name for name in peft.__all__ if not hasattr(peft_fx, name)}
    assert absent <= NAMES and not any(hasattr(peft_fx, name) for name in NAMES)
    with pytest.raises(AttributeError, match=NOT_YET):
        _ = peft_fx.create_arrow_model


def lora(**fields):
    return lambda: peft_fx.LoraConfig(**fields)


def read(**fields):
    return lambda: as_config({"peft_type": "LORA", **fields})


def named(name):
    return lambda: getattr(peft_fx, name)


TYPED = {
    "rank for r": (lora(rank=8), "'r'"),
    "a singular": (lora(target_module=["q"]), "'target_modules'"),
    "letters swapped": (lora(lora_aplha=8), "'lora_alpha'"),
    "alpha for lora_alpha": (read(alpha=8), "'lora_alpha'"),
    "rank in a dict": (read(rank=8), "'r'"),
    "a method": (read(peft_type="lroa"), "'LORA'"),
    "a method's start": (read(peft_type="ada_lora"), "'ADALORA'"),
    "a task": (lora(task_type="CASUAL_LM"), "'CAUSAL_LM'"),
    "a task in small letters": (lora(task_type="causal_lm"), "'CAUSAL_LM'"),
    "a choice": (lora(init_lora_weights="gausian"), "'gaussian'"),
    "a class": (named("LoraConfg"), "'LoraConfig'"),
    "a function": (named("get_peft_modle"), "'get_peft_model'"),
}


@pytest.mark.parametrize("ask, meant", TYPED.values(), ids=TYPED)
def test_a_mistyped_name_is_told_what_was_meant(ask, meant):
    with pytest.raises((PeftFxError, AttributeError)) as error:
        ask()
    assert str(error.value).endswith(f"; did you mean {meant}?") and "\n" not in str(error.value)


@pytest.mark.parametrize("value", [[], {}, 3, True, ""], ids=repr)
def test_a_task_that_is_no_name_of_one_is_refused(value):
    with pytest.raises(PeftFxError, match="task_type=.*: expected one of SEQ_CLS"):
        peft_fx.LoraConfig(task_type=value)


def test_a_mistyped_adapter_or_recipe_is_told_what_was_meant():
    model = peft_fx.get_peft_model(model_of("biased_llama"), peft_fx.LoraConfig(target_modules=["q_proj"]))
    graph = peft_fx.apply(captured("biased_llama"), {"peft_type": "LORA", "target_modules": ["q_proj"]})
    for ask in (lambda: model.set_adapter("defualt"), lambda: peft_fx.set_adapter(graph, "defualt")):
        with pytest.raises(PeftFxError, match="; did you mean 'default'\\?$"):
            ask()
    with pytest.raises(PeftFxError, match="; did you mean 'lora'\\?$"):
        recipe_of("lroa", None)
    with pytest.raises(PeftFxError, match="'q_porj' matches nothing; nearest: q_proj"):
        peft_fx.apply(captured("biased_llama"), {"peft_type": "LORA", "target_modules": ["q_porj"]})
