"""`PeftModel.to_graph` is `apply(capture(model))`: the same forms, operators and numbers."""

import pytest
import torch
from graphs import captured, inputs, model_of
from peft_fx.passes.core.base import op_counts

import peft_fx

NAME = "biased_llama"
LORA = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
CASES = {
    "LoRA": (NAME, LORA),
    "dropout": (NAME, LORA | {"lora_dropout": 0.3}),
    "embedding and head": (NAME, LORA | {"target_modules": ["embed_tokens", "lm_head"], "bias": "all"}),
    "DoRA": (NAME, LORA | {"use_dora": True}),
    "IA3": (
        NAME,
        {"peft_type": "IA3", "target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    ),
    "weight form": (NAME, {"peft_type": "LOKR", "r": 2, "target_modules": "all-linear", "init_weights": False}),
    "experts": ("mixtral", LORA | {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}),
    "many kinds": (
        "mixed",
        LORA | {"target_modules": ["embed", "conv", "turned", "plain"], "modules_to_save": ["norm"]},
    ),
}


def both(tmp_path, name, config):
    """(the graph of a PeftModel, the adapted graph of the model) with the same adapter."""
    model = peft_fx.get_peft_model(model_of(name), config).eval()
    model.save_pretrained(tmp_path)
    return model, model.to_graph((), inputs(name)), peft_fx.load_adapter(captured(name), tmp_path, trainable=True)


def result(graph, name):
    out = graph(**inputs(name))
    return out if torch.is_tensor(out) else out.logits


LONG = {"DoRA", "IA3", "embedding and head", "experts", "weight form"}
ROWS = [pytest.param(*case, id=key, marks=[pytest.mark.slow] * (key in LONG)) for key, case in CASES.items()]


@pytest.mark.parametrize("name, config", ROWS)
def test_forms_operators_and_outputs_are_those_of_a_captured_model(name, config, tmp_path):
    torch.manual_seed(0)
    model, graph, expected = both(tmp_path, name, config)
    assert peft_fx.explain(graph).rows == peft_fx.explain(expected).rows
    assert op_counts(graph) == op_counts(expected) and not op_counts(graph)["new_empty.default"]
    with torch.no_grad():
        torch.testing.assert_close(result(graph, name), result(expected, name), rtol=0, atol=0)
        torch.testing.assert_close(result(graph, name), result(model, name))
    losses = []
    for made in (graph, expected):
        torch.manual_seed(1)
        loss = result(made.train(), name).square().mean()
        loss.backward()
        losses.append(loss)
    assert torch.equal(*losses)


def test_a_graph_of_a_peft_model_takes_mixed_batches(tmp_path):
    model = peft_fx.get_peft_model(model_of(NAME), LORA | {"lora_dropout": 0.3}).eval()
    model.add_adapter("other", LORA)
    model.base_model.set_adapter(["default", "other"])
    mixed = peft_fx.mixed_batch(model.to_graph((), inputs(NAME)))
    names = ["other", "default"]
    with torch.no_grad():
        found = mixed(**inputs(NAME), adapter_ids=torch.tensor([["default", "other"].index(n) for n in names])).logits
        torch.testing.assert_close(found, model(**inputs(NAME), adapter_names=names).logits)


def test_the_model_is_adapted_after_its_graph_was_made_as_before():
    model = peft_fx.get_peft_model(model_of(NAME), LORA).eval()
    expected = result(model, NAME)
    with model.disable_adapter():
        bare = result(model, NAME)
        torch.testing.assert_close(result(model.to_graph((), inputs(NAME)), NAME), bare)
        assert torch.equal(result(model, NAME), bare)
    with pytest.raises(peft_fx.CaptureError):
        model.to_graph((), {"no_such_input": torch.zeros(1)})
    assert torch.equal(result(model, NAME), expected)
    model.merge_adapter()
    model.to_graph((), inputs(NAME))
    torch.testing.assert_close(result(model, NAME), expected)
