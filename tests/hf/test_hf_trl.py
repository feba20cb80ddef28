"""TRL's trainers around a `PeftModel`: the losses that they give with PEFT's, checkpoints that go on and that PEFT loads.

They ask `isinstance(model, peft.PeftModel)` to know where the model itself is, and what a reference without adapters is.
"""

import copy
import json
import random
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from words import llama, sentences, tokenizer

import peft_fx

pytestmark = pytest.mark.slow

LORA = dict(task_type="CAUSAL_LM", r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"])
RUN = dict(max_steps=4, save_steps=2, logging_steps=1, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[],
           use_cpu=True, disable_tqdm=True, seed=7, bf16=False)  # fmt: skip


@pytest.fixture(scope="module")
def trl():
    """The package, which takes seconds to import."""
    return pytest.importorskip("trl")


@pytest.fixture(scope="module")
def base():
    """(model, tokenizer)."""
    torch.manual_seed(0)
    model, template = llama()
    return model, tokenizer(template)


def rows(completions):
    datasets = pytest.importorskip("datasets")
    return datasets.Dataset.from_list([
        {"prompt": f"text : {row['sentence']} label :", **completions(row)} for row in sentences(16, random.Random(0))
    ])  # fmt: skip


@pytest.fixture(scope="module")
def answers(trl):
    return rows(lambda row: {"completion": f" {row['label']}"})


@pytest.fixture(scope="module")
def preferred(trl):
    return rows(lambda row: {"chosen": f" {row['label']}", "rejected": " text"})


@pytest.fixture
def load(base, tmp_path):
    """A function: library -> a fresh model with the same trainable adapter; config as for the first call."""

    def loaded(library, **config):
        if not (tmp_path / "start").exists():
            torch.manual_seed(1)
            theirs = peft.LoraConfig(**{**LORA, **config}, init_lora_weights=False)
            peft.get_peft_model(copy.deepcopy(base[0]), theirs).save_pretrained(tmp_path / "start")
        model = library.PeftModel.from_pretrained(copy.deepcopy(base[0]), tmp_path / "start", is_trainable=True)
        return model

    return loaded


def logged(trainer, *names):
    return {name: [entry[name] for entry in trainer.state.log_history if name in entry] for name in names}


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, numbers in expected.items():
        assert numbers and found[name] == pytest.approx(numbers, abs=1e-5), name


@pytest.fixture
def fine_tuned(trl, base, answers):
    """A function: model, folder -> (trainer, what it logged)."""

    def run(model, folder, resume=None, **options):
        arguments = trl.SFTConfig(
            str(folder),
            **{"eval_strategy": "steps", "eval_steps": 2, "gradient_checkpointing": False, **options},
            **RUN,
        )
        trainer = trl.SFTTrainer(
            model, arguments, train_dataset=answers, eval_dataset=answers, processing_class=base[1]
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer, logged(trainer, "loss", "eval_loss", "mean_token_accuracy", "eval_entropy")

    return run


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}], ids=["plain", "checkpointing"])
def test_supervised_fine_tuning_gives_pefts_losses_and_resumes(base, load, fine_tuned, tmp_path, options):
    _, expected = fine_tuned(load(peft, lora_dropout=0.1), tmp_path / "theirs", **options)
    trainer, found = fine_tuned(load(peft_fx), tmp_path / "ours", **options)
    assert_close(found, expected)
    other, resumed = fine_tuned(load(peft_fx), tmp_path / "ours", str(tmp_path / "ours" / "checkpoint-2"), **options)
    assert resumed == found
    ours, again = (peft_fx.get_peft_model_state_dict(t.model) for t in (trainer, other))
    assert ours.keys() == again.keys() and all(torch.equal(ours[k], again[k]) for k in ours)
    back = peft.PeftModel.from_pretrained(copy.deepcopy(base[0]), tmp_path / "ours" / "checkpoint-4")
    written = peft.get_peft_model_state_dict(back)
    assert written.keys() == ours.keys() and all(torch.equal(written[k], ours[k]) for k in ours)


WHOLE = {
    "head": {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]},
    "rows": {"trainable_token_indices": {"embed_tokens": [1, 5, 9]}, "target_modules": ["q_proj"]},
}


@pytest.mark.parametrize("config", WHOLE.values(), ids=WHOLE)
def test_a_head_that_is_read_and_not_called_is_trained(base, load, fine_tuned, tmp_path, config):
    """TRL multiplies by `lm_head.weight` itself: it has to get the numbers that are trained."""
    _, expected = fine_tuned(load(peft, **config), tmp_path / "theirs", eval_strategy="no")
    model = load(peft_fx)
    before = {k: t.clone() for k, t in peft_fx.get_peft_model_state_dict(model).items()}
    trainer, found = fine_tuned(model, tmp_path / "ours", eval_strategy="no")
    assert found["loss"] == pytest.approx(expected["loss"], abs=1e-5) and found["loss"][-1] < found["loss"][0]
    after = peft_fx.get_peft_model_state_dict(trainer.model)
    assert after.keys() == before.keys() and not any(torch.equal(after[k], before[k]) for k in after)


def test_preferences_are_learnt_beside_a_reference_adapter_as_in_peft(trl, base, load, preferred, tmp_path):
    """The trainer copies "default" to "ref" by parameters' names, switches between the two, and turns dropout off."""
    found = []
    for library in (peft, peft_fx):
        arguments = trl.DPOConfig(str(tmp_path / library.__name__), gradient_checkpointing=False, **RUN)
        trainer = trl.DPOTrainer(
            load(library, lora_dropout=0.3), args=arguments, train_dataset=preferred, processing_class=base[1]
        )
        trainer.train()
        assert list(trainer.model.peft_config) == ["default", "ref"]
        found.append(logged(trainer, "loss", "rewards/margins"))
    assert_close(found[1], found[0])
    assert found[1]["loss"][0] == pytest.approx(0.6931472, abs=1e-6) and found[1]["loss"][-1] < 0.693


def test_the_losses_are_the_same_where_peft_cannot_be_imported(base, load, fine_tuned, answers, tmp_path):
    """TRL takes the model for one of transformers' own there, and gives it a forward for these."""
    _, expected = fine_tuned(load(peft_fx), tmp_path / "with", eval_strategy="no")
    base[0].save_pretrained(tmp_path / "base")
    base[1].save_pretrained(tmp_path / "base")
    options = {**RUN, "max_steps": 4}
    (tmp_path / "given.json").write_text(json.dumps({"options": options, "rows": answers.to_list()}))
    script = Path(__file__).with_name("trl_without_peft.py")
    run = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True)
    assert (tmp_path / "losses.json").exists(), run.stderr[-2000:]
    found = json.loads((tmp_path / "losses.json").read_text())
    assert not found["peft"] and found["losses"] == pytest.approx(expected["loss"], abs=1e-5)
    written = load_file(tmp_path / "run" / "checkpoint-4" / "adapter_model.safetensors")
    start = load_file(tmp_path / "start" / "adapter_model.safetensors")
    assert written.keys() == start.keys() and not any(torch.equal(written[k], start[k]) for k in start)


def test_a_config_of_ours_is_refused_as_peft_config(trl, base, answers, tmp_path):
    """TRL would give it to PEFT's get_peft_model: wrap the model first."""
    arguments = trl.SFTConfig(str(tmp_path), **RUN)
    with pytest.raises(TypeError, match="must be a `peft.PeftConfig` instance"):
        trl.SFTTrainer(copy.deepcopy(base[0]), arguments, train_dataset=answers, processing_class=base[1],
                       peft_config=peft_fx.LoraConfig(**LORA))  # fmt: skip
