"""How a LoRA adapter begins: its file is read whatever it says of that, and a new one begins only as this version can."""

import json
import warnings

import peft
import pytest
import torch
from graphs import captured, inputs, model_of, output
from safetensors.torch import load_file

import peft_fx
from peft_fx import AdapterFileError, PeftFxError

NAME = "biased_llama"
LORA = dict(r=4, target_modules=["q_proj", "down_proj"])
MOVE = ["corda", "loftq", "lora_ga"]  # these take a start out of the base that no file gives
STAY = ["orthogonal", "gaussian", "Gaussian", "eva", "mica", "from_the_future"]
DETAILS = {
    "eva": {"eva_config": {"rho": 2.0}},
    "loftq": {"loftq_config": {"loftq_bits": 4}},
    "corda": {"corda_config": {"a": 1}},
}


def folder_that_began(folder, init, name=NAME, **options):
    """PEFT's files of an adapter with random numbers, which say that it began like this."""
    torch.manual_seed(0)
    model = peft.get_peft_model(model_of(name), peft.LoraConfig(**{**LORA, **options}, init_lora_weights=False))
    model.save_pretrained(folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"init_lora_weights": init} | DETAILS.get(init, {})))
    return model.eval()


@pytest.mark.parametrize("init", MOVE + STAY)
def test_a_file_is_read_however_its_adapter_began(init, tmp_path):
    reference = folder_that_began(tmp_path / "a", init)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        model = peft_fx.PeftModel.from_pretrained(model_of(NAME), tmp_path / "a").eval()
    said = [str(w.message) for w in seen if "init_lora_weights" in str(w.message)]
    assert len(said) == (init in MOVE) and all("path_initial_model_for_weight_conversion" in text for text in said)
    torch.testing.assert_close(model(**inputs(NAME)).logits, reference(**inputs(NAME)).logits)

    model.save_pretrained(tmp_path / "b")
    written = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert written["init_lora_weights"] == init and DETAILS.get(init, {}).items() <= written.items()
    a, b = (load_file(tmp_path / d / "adapter_model.safetensors") for d in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("init", ["pissa", "eva", "from_the_future"])
def test_a_new_adapter_cannot_begin_as_a_file_says(init, tmp_path):
    folder_that_began(tmp_path, init)
    config = peft_fx.PeftConfig.from_pretrained(tmp_path)
    for begin in (peft_fx.get_peft_model, lambda model, config: peft_fx.apply(captured(NAME), config)):
        with pytest.raises(PeftFxError, match="not in this version yet|expected one of"):
            begin(model_of(NAME), config)


AGAIN = [
    ("pissa", {}), ("olora", {}),
    *(pytest.param(init, options, marks=pytest.mark.slow) for init, options in [
        ("pissa", {"use_dora": True}), ("pissa", {"use_rslora": True}), ("olora", {"use_rslora": True}),
        ("OLoRA", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3}}),
    ]),
]  # fmt: skip


@pytest.mark.parametrize("init, options", AGAIN, ids=str)
def test_a_start_that_the_base_weight_gives_again_is_taken_out_as_in_peft(init, options, tmp_path):
    folder_that_began(tmp_path / "a", init, **options)
    reference = peft.PeftModel.from_pretrained(model_of(NAME), tmp_path / "a").eval()(**inputs(NAME)).logits
    model = peft_fx.PeftModel.from_pretrained(model_of(NAME), tmp_path / "a").eval()
    torch.testing.assert_close(model(**inputs(NAME)).logits, reference)
    base = model.get_base_model()
    assert all(torch.equal(base.get_parameter(name), p) for name, p in model_of(NAME).named_parameters())

    model.save_pretrained(tmp_path / "b")
    again = peft.PeftModel.from_pretrained(model_of(NAME), tmp_path / "b").eval()
    torch.testing.assert_close(again(**inputs(NAME)).logits, reference)
    graph = peft_fx.prepare_hotswap(peft_fx.apply(captured(NAME), {"peft_type": "LORA", **LORA, **options}), max_rank=8)
    peft_fx.hotswap(graph, tmp_path / "a")
    torch.testing.assert_close(output(graph, NAME), reference)


def test_such_a_file_is_swapped_into_a_merged_graph(tmp_path):
    folder_that_began(tmp_path, "pissa")
    merged = peft_fx.merge(peft_fx.apply(captured(NAME), {"peft_type": "LORA", **LORA, "init_lora_weights": False}))
    expected = output(peft_fx.load_adapter(captured(NAME), tmp_path), NAME)
    peft_fx.hotswap(merged, tmp_path)
    torch.testing.assert_close(output(merged, NAME), expected)


def test_such_a_file_of_other_shapes_is_refused(tmp_path):
    folder_that_began(tmp_path, "pissa", r=2)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 4}))
    with pytest.raises(AdapterFileError, match="expected shape"):
        peft_fx.PeftModel.from_pretrained(model_of(NAME), tmp_path)


def test_training_goes_on_with_such_a_start_and_says_so(tmp_path):
    folder_that_began(tmp_path, "pissa")
    with pytest.warns(UserWarning, match="what it began with is trained too"):
        peft_fx.PeftModel.from_pretrained(model_of(NAME), tmp_path, is_trainable=True)


@pytest.mark.parametrize("setting, says", [("meta", "weights on meta"), ("conv", "there is none for kind conv1d")])
def test_a_start_that_the_base_weight_cannot_give_is_an_error(setting, says, tmp_path):
    name, targets = (NAME, LORA["target_modules"]) if setting == "meta" else ("mixed", ["conv"])
    folder_that_began(tmp_path, "pissa", name, target_modules=targets)
    base = model_of(name).to("meta") if setting == "meta" else model_of(name)
    with pytest.raises(AdapterFileError, match=says):
        peft_fx.PeftModel.from_pretrained(base, tmp_path)


@pytest.mark.parametrize(
    "model, options, says",
    [
        (NAME, {"r": 3}, "needs an even rank, got r=3; nearest valid: 4"),
        ("mixed", {"target_modules": ["conv"]}, "no meaning on kind conv1d"),
    ],
)
def test_an_orthogonal_start_is_refused_where_there_is_none(model, options, says):
    with pytest.raises(PeftFxError, match=says):
        peft_fx.get_peft_model(
            model_of(model), peft_fx.LoraConfig(**{**LORA, **options}, init_lora_weights="orthogonal")
        )
