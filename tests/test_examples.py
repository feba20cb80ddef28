"""The examples run as they stand, on a model of two dozen words."""

import csv
import random
import runpy
from pathlib import Path

import pytest
import torch
from words import llama, roberta, sentences, tokenizer

import peft_fx

EXAMPLES = Path(__file__).parent.parent / "examples"

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fresh_dynamo")]


def example(name):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models with their tokenizers, and what the scripts write."""
    folder = tmp_path_factory.mktemp("examples")
    for make in (llama, roberta):
        torch.manual_seed(0)
        model, template = make()
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(4 if p.dim() > 1 else 1)  # at transformers' scale tiny models say the same to everything
        model.save_pretrained(folder / make.__name__)
        tokenizer(template).save_pretrained(folder / make.__name__)
    return folder


@pytest.fixture(scope="module")
def compiled(folder):
    torch._dynamo.reset()
    return example("compile_first")(str(folder / "llama"), str(folder / "adapters"), steps=6, length=24)


def test_every_example_is_run_here():
    tried = {"finetune", "compile_first", "classify", "many_adapters", "merge_and_export"}
    assert {path.stem for path in EXAMPLES.glob("*.py")} == tried


def test_fine_tuning_with_trainer(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    text = " ".join(row["sentence"] for row in sentences(200, random.Random(0)))
    found = example("finetune")(str(folder / "llama"), str(tmp_path / "tuned"), text, steps=20, length=16, lr=1e-2)
    assert found["losses"][-1] < found["losses"][0]
    ids = torch.arange(4, 12)[None]
    with torch.no_grad():
        torch.testing.assert_close(found["loaded"](input_ids=ids).logits, found["trained"](input_ids=ids).logits)
    assert found["tokens"].shape[1] > 8


def test_training_and_swapping_compiled_graphs(compiled):
    for losses in compiled["losses"].values():
        assert losses[-1] < losses[0]
    for name, output in compiled["outputs"].items():
        eager = peft_fx.load_adapter(compiled["graph"], compiled["folders"][name]).eval()(**compiled["call"]).logits
        torch.testing.assert_close(output, eager, rtol=1e-4, atol=1e-5)
    assert not torch.equal(compiled["outputs"]["loops"], compiled["outputs"]["classes"])


def test_classifying_sentences(folder, tmp_path):
    rows = list(sentences(48, random.Random(0)))
    with (tmp_path / "sentences.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["sentence", "label"])
        writer.writeheader()
        writer.writerows(rows)
    found = example("classify")(
        str(folder / "roberta"), str(tmp_path / "sentences.csv"), str(tmp_path / "out"), 12, 5e-3
    )
    assert found["losses"][-1] < found["losses"][0]
    assert found["right"] > 0.9


def test_many_adapters_in_one_compiled_graph(folder, compiled):
    found = example("many_adapters")(str(folder / "llama"), [str(p) for p in compiled["folders"].values()])
    for row, output in enumerate(found["alone"].values()):
        torch.testing.assert_close(found["together"][row], output[row], rtol=1e-4, atol=1e-5)
    assert list(found["alone"]) == ["loops", "classes", "base"]


def test_merging_and_exporting(folder, compiled, tmp_path):
    found = example("merge_and_export")(str(folder / "llama"), str(compiled["folders"]["loops"]), str(tmp_path / "m"))
    assert found["exact"] and found["exported"] < 1e-5
    torch.testing.assert_close(found["whole"], found["expected"], rtol=1e-4, atol=1e-5)
