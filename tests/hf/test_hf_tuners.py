"""PEFT's classes of tuners, and the dropout that tools find in them, beside PEFT's own."""

import copy
import pickle

import conformance as c
import peft
import pytest
import torch
from graphs import inputs, model_of
from torch import nn

import peft_fx

LLAMA = "biased_llama"
CASES = [
    ({"peft_type": "LORA", "r": 4, "init_lora_weights": False}, ["q_proj", "down_proj"]),
    ({"peft_type": "LORA", "r": 4, "use_dora": True, "init_lora_weights": False}, ["q_proj"]),
    ({"peft_type": "IA3", "feedforward_modules": [], "init_ia3_weights": False}, ["k_proj", "v_proj"]),
    ({"peft_type": "LOHA", "r": 2, "init_weights": False}, ["q_proj", "down_proj"]),
    ({"peft_type": "VERA", "r": 4, "init_weights": False}, ["q_proj", "v_proj"]),
    ({"peft_type": "LN_TUNING"}, ["norm"]),
]
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}


def made(library, options, targets, **more):
    """The library's tuner for a config, by the class that its table has."""
    kind = library.PEFT_TYPE_TO_TUNER_MAPPING[options["peft_type"]]
    assert getattr(library, kind.__name__) is kind
    config = library.PEFT_TYPE_TO_CONFIG_MAPPING[options["peft_type"]]
    chosen = config(target_modules=targets, **{k: v for k, v in options.items() if k != "peft_type"}, **more)
    torch.manual_seed(3)
    return c.quiet(kind, model_of(LLAMA), chosen, "default")


@pytest.mark.slow
@pytest.mark.parametrize(("options", "targets"), CASES, ids=lambda v: v["peft_type"] if isinstance(v, dict) else "")
def test_a_tuner_without_a_peft_model_computes_as_pefts(options, targets):
    theirs, ours = (made(library, options, targets) for library in (peft, peft_fx))
    assert type(ours).__name__ == type(theirs).__name__
    one, other = (m(**inputs(LLAMA)).logits for m in (theirs, ours))
    torch.testing.assert_close(other, one)
    for m, out in ((theirs, one), (ours, other)):
        out.square().sum().backward()
        assert all((p.grad is not None) == p.requires_grad for p in m.parameters())
    torch.testing.assert_close(ours.unload()(**inputs(LLAMA)).logits, model_of(LLAMA)(**inputs(LLAMA)).logits)


def test_every_tuner_of_pefts_that_has_a_method_here_has_a_class_of_the_same_name():
    theirs = {str(t.value): cls.__name__ for t, cls in peft.PEFT_TYPE_TO_TUNER_MAPPING.items()}
    for name in ("PEFT_TYPE_TO_TUNER_MAPPING", "PEFT_TYPE_TO_MIXED_MODEL_MAPPING"):
        assert {str(t): cls.__name__ for t, cls in getattr(peft_fx, name).items()}.items() <= theirs.items()
    assert {theirs[t] for t in peft_fx.PEFT_TYPE_TO_TUNER_MAPPING} <= set(dir(peft_fx))


def test_the_base_model_of_a_peft_model_is_of_its_methods_class():
    model = peft_fx.get_peft_model(model_of(LLAMA), peft_fx.LoraConfig(**LORA))
    assert isinstance(model.base_model, peft_fx.LoraModel) and not isinstance(model.base_model, peft_fx.IA3Model)
    again = pickle.loads(pickle.dumps(model))
    assert type(again.base_model) is peft_fx.LoraModel and str(model.base_model).startswith("LoraModel(")
    mixed = peft_fx.get_peft_model(model_of(LLAMA), peft_fx.LoraConfig(**LORA), mixed=True)
    assert not isinstance(mixed.base_model, peft_fx.LoraModel)


def test_a_tuner_takes_a_dict_of_configs_and_its_own_methods_alone():
    configs = {"mine": peft_fx.LoraConfig(**LORA)}
    assert list(peft_fx.LoraModel(model_of(LLAMA), configs, "mine").peft_config) == ["mine"]
    model = model_of(LLAMA)
    with pytest.raises(peft_fx.RecipeError, match="IA3Model has IA3 adapters, and the config is for LORA"):
        peft_fx.IA3Model(model, configs, "mine")
    assert all(p.requires_grad for p in model.parameters()) and "forward" not in vars(model.model.layers[0])


@pytest.mark.slow
def test_targeted_names_are_pefts():
    config = {"target_modules": ["q_proj", "v_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}
    theirs, ours = (
        c.quiet(library.get_peft_model, c.build("mixtral"), library.LoraConfig(r=2, **config)).base_model
        for library in (peft, peft_fx)
    )
    assert sorted(ours.targeted_module_names) == sorted(theirs.targeted_module_names)
    assert sorted(ours.targeted_parameter_names) == sorted(theirs.targeted_parameter_names) != []


# Dropout


def dropped_out(library, p=0.5, **options):
    config = library.LoraConfig(**{**LORA, "lora_dropout": p, **options})
    torch.manual_seed(3)
    return library.get_peft_model(model_of(LLAMA), config).train()


def set_all(model, p):
    """What TRL's trainers do with p = 0."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = p


def logits(model):
    torch.manual_seed(5)
    return model(**inputs(LLAMA)).logits


@pytest.mark.parametrize("use_dora", [False, True])
def test_dropout_that_a_tool_sets_is_that_of_the_adapters_as_in_peft(use_dora):
    models = [dropped_out(library, use_dora=use_dora) for library in (peft, peft_fx)]
    seen = []
    for p in (0.5, 0.0, 0.25, 0.5):
        for model in models:
            set_all(model, p)
        one, other = map(logits, models)
        torch.testing.assert_close(other, one)
        seen.append(other)
    assert torch.equal(seen[0], seen[3]) and not torch.equal(seen[0], seen[2]) and not torch.equal(seen[1], seen[2])
    assert torch.equal(logits(models[1].eval()), logits(models[1].eval()))


@pytest.mark.slow
def test_dropout_in_parts_that_dynamo_traces_is_set_too():
    config = {"peft_type": "LORA", "r": 4, "target_modules": ["attn"], "lora_dropout": 0.5, "init_lora_weights": False}
    model, given = c.quiet(peft_fx.get_peft_model, c.build("attention"), config).train(), c.inputs("attention")

    def outputs():
        return c.floats(model(**given))[0]

    assert not torch.equal(outputs(), outputs())
    set_all(model, 0.0)
    assert torch.equal(outputs(), outputs())


def test_each_adapter_has_its_own_dropout_and_a_copy_has_copies():
    model = dropped_out(peft_fx)
    model.add_adapter("still", peft_fx.LoraConfig(**LORA))
    model.add_adapter("other", peft_fx.LoraConfig(**LORA, lora_dropout=0.25))
    shown = [m for m in model.modules() if isinstance(m, nn.Dropout)]
    assert [m.p for m in shown] == [0.5, 0.25]
    twin = copy.deepcopy(model)
    set_all(twin, 0.0)
    assert [m.p for m in shown] == [0.5, 0.25] and twin.peft_config["default"].lora_dropout == 0.0
    model.delete_adapter("default")
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == [0.25]
    with pytest.raises(peft_fx.RecipeError, match="lora_dropout"):
        shown[1].p = 1.5
    assert shown[1].p == 0.25


def test_a_tuners_prefix_is_in_the_names_of_adapters_and_in_no_other():
    model = peft_fx.get_peft_model(model_of(LLAMA), peft_fx.LoraConfig(**LORA))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and trained == {name for name, _ in model.named_parameters() if model.prefix in name}
    injected = peft_fx.inject_adapter_in_model(peft_fx.LoraConfig(**LORA), model_of(LLAMA))
    assert {n for n, p in injected.named_parameters() if p.requires_grad} == {
        n for n, _ in injected.named_parameters() if peft_fx.LoraModel.prefix in n
    }
