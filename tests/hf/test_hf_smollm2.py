"""The Hugging Face face on the real model: a Trainer's run, taken up again in the middle, and generated tokens."""

import copy

import peft
import pytest
import torch
import transformers

import peft_fx
from tools.text import blocks

pytestmark = pytest.mark.slow
STEPS = 6


@pytest.fixture(scope="module")
def real(smollm2):
    """(model, tokenizer, token blocks)."""
    model, tokenizer = smollm2
    return model, tokenizer, blocks(tokenizer, 24, 0)[0][: 2 * STEPS]


@pytest.fixture(scope="module")
def start(real, tmp_path_factory):
    """The folder of an adapter with an effect."""
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear")
    model = peft.get_peft_model(copy.deepcopy(real[0]), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.03)
    folder = tmp_path_factory.mktemp("start")
    model.save_pretrained(folder)
    return folder


def loaded(library, real, start, **options):
    return library.PeftModel.from_pretrained(copy.deepcopy(real[0]), start, **options)


def train(model, data, folder, resume=None):
    """(losses by step, the trainer)."""
    arguments = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=2, max_steps=STEPS, save_steps=STEPS // 2, logging_steps=1, learning_rate=1e-3,
        report_to=[], use_cpu=True, disable_tqdm=True, seed=7,
    )  # fmt: skip
    rows = [{"input_ids": ids, "labels": ids} for ids in data]
    trainer = transformers.Trainer(model, arguments, train_dataset=rows)
    trainer.train(resume_from_checkpoint=resume)
    return [h["loss"] for h in trainer.state.log_history if "loss" in h], trainer


def test_a_trainers_losses_are_pefts_and_go_on_after_resuming(real, start, tmp_path):
    data = real[2]
    expected, _ = train(loaded(peft, real, start, is_trainable=True), data, tmp_path / "theirs")
    found, trainer = train(loaded(peft_fx, real, start, is_trainable=True), data, tmp_path / "ours")
    assert len(found) == STEPS and found == pytest.approx(expected, abs=1e-4)
    fresh = loaded(peft_fx, real, start, is_trainable=True)
    resumed, again = train(fresh, data, tmp_path / "ours", resume=str(tmp_path / "ours" / f"checkpoint-{STEPS // 2}"))
    assert resumed == pytest.approx(found, abs=1e-6)
    one, other = (peft_fx.get_peft_model_state_dict(t.model) for t in (trainer, again))
    for key, tensor in one.items():
        torch.testing.assert_close(other[key], tensor, rtol=0, atol=1e-6)


WAYS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_p": 0.9},
    "beam": {"do_sample": False, "num_beams": 3},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
}


@pytest.fixture(scope="module")
def models(real, start):
    """(PEFT's model, ours) with the same adapter."""
    return [loaded(library, real, start).eval() for library in (peft, peft_fx)]


@pytest.mark.parametrize("way", WAYS)
def test_generated_tokens_are_pefts(real, models, way):
    inputs = real[1](
        ["The grammar of a class definition is", "A name"], return_tensors="pt", padding=True, padding_side="left"
    )
    tokens = []
    for model in models:
        torch.manual_seed(3)
        tokens.append(model.generate(**inputs, max_new_tokens=12, pad_token_id=real[1].pad_token_id or 0, **WAYS[way]))
    assert torch.equal(*tokens)
    with models[1].disable_adapter():
        torch.manual_seed(3)
        bare = models[1].generate(**inputs, max_new_tokens=12, pad_token_id=real[1].pad_token_id or 0, **WAYS[way])
    assert bare.shape != tokens[0].shape or not torch.equal(bare, tokens[0])
