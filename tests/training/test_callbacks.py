"""AdaLoRA and AdaMSS under a Trainer: the losses, ranks and files that PEFT's give."""

import copy

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch.utils.data import Dataset
from words import llama

import peft_fx
from peft_fx.training.allocators import allocators, penalty
from peft_fx.training.callbacks import AllocatorCallback

pytestmark = pytest.mark.slow

STEPS = 10
ADALORA = dict(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], init_r=4, target_r=2, total_step=STEPS, tinit=1,
               tfinal=3, deltaT=2, lora_dropout=0.0)  # fmt: skip


class Sentences(Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, i):
        ids = torch.randint(4, 20, (7,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": ids}


class Budget(hf.TrainerCallback):
    """As PEFT's users write it."""

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        model.base_model.update_and_allocate(state.global_step)


@pytest.fixture
def models(tmp_path):
    """(PEFT's model, ours) with the same AdaLoRA adapter."""
    torch.manual_seed(0)
    base, _ = llama()
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.AdaLoraConfig(**ADALORA))
    theirs.save_pretrained(tmp_path / "start")
    return theirs, peft_fx.PeftModel.from_pretrained(base, tmp_path / "start", is_trainable=True)


def train(model, folder, callback):
    arguments = hf.TrainingArguments(str(folder), per_device_train_batch_size=4, max_steps=STEPS, logging_steps=1, learning_rate=1e-2,
                                     eval_strategy="steps", eval_steps=5, save_strategy="no", report_to=[], use_cpu=True,
                                     disable_tqdm=True, seed=7)  # fmt: skip
    trainer = hf.Trainer(model, arguments, train_dataset=Sentences(), eval_dataset=Sentences(), callbacks=[callback])
    trainer.train()
    return {name: [h[name] for h in trainer.state.log_history if name in h] for name in ("loss", "eval_loss")}


def test_adaloras_losses_and_ranks_are_pefts(models, tmp_path):
    theirs, ours = models
    expected = train(theirs, tmp_path / "theirs", Budget())
    found = train(ours, tmp_path / "ours", AllocatorCallback())
    for name, numbers in expected.items():
        assert numbers and found[name] == pytest.approx(numbers, abs=1e-5), name
    pattern = ours.base_model.allocators["default"].rank_pattern
    theirs.save_pretrained(tmp_path / "end")  # its names lose the adapter's there
    assert pattern == theirs.peft_config["default"].rank_pattern
    kept = [sum(components) for components in pattern.values()]
    assert sum(kept) < 4 * len(kept) and len(set(kept)) > 1
    ours.save_pretrained(tmp_path / "kept")
    back = peft.PeftModel.from_pretrained(llama_again(), tmp_path / "kept").eval()
    ids = Sentences()[0]["input_ids"][None]
    torch.testing.assert_close(back(input_ids=ids).logits, ours.eval()(input_ids=ids).logits)


def test_of_a_state_dict_too_the_kept_components_are_saved(models, tmp_path):
    _, ours = models
    train(ours, tmp_path / "run", Budget())
    doubled = {k: 2 * t for k, t in ours.state_dict().items()}
    ours.save_pretrained(tmp_path / "own")
    ours.save_pretrained(tmp_path / "given", state_dict=doubled)
    own, given = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("own", "given"))
    assert own.keys() == given.keys() and min(t.shape[0] for k, t in own.items() if "lora_A" in k) < 4
    assert all(torch.equal(given[k], 2 * own[k]) for k in own if "lora_" in k)


def llama_again():
    torch.manual_seed(0)
    return llama()[0]


def test_a_loop_by_hand_as_pefts_users_write_it(models):
    losses = []
    for model in models:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        model.train()
        for step in range(STEPS):
            ids = torch.stack([Sentences()[4 * (step % 4) + i]["input_ids"] for i in range(4)])
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            model.base_model.update_and_allocate(step)
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[STEPS:] == pytest.approx(losses[:STEPS], abs=1e-5)


def test_a_method_is_asked_for_its_own_work():
    """AdaMSS allocates only with use_asa, LoRA never; a model without adapters is refused."""
    config = peft_fx.AdamssConfig(target_modules=["q_proj"], r=4, num_subspaces=2, use_asa=True, init_warmup=0, final_warmup=4,
                                  mask_interval=2, asa_target_subspaces=1)  # fmt: skip
    for use_asa in (True, False):
        model = peft_fx.get_peft_model(llama_again(), {**config.to_dict(), "use_asa": use_asa})
        assert list(model.base_model.allocators) == ["default"] * use_asa
    lora = peft_fx.get_peft_model(llama_again(), peft_fx.LoraConfig(r=2, target_modules=["q_proj"]))
    graph = lora.base_model.backend.adapters
    assert allocators(graph) == {} and penalty(graph) == 0
    with pytest.raises(TypeError, match="expected a PeftModel"):
        AllocatorCallback().on_train_begin(None, None, None, model=llama_again())


def test_adamss_stops_subspaces_under_a_trainer(tmp_path):
    config = peft_fx.AdamssConfig(target_modules=["q_proj", "down_proj"], r=4, num_subspaces=2, use_asa=True, init_warmup=0,
                                  final_warmup=6, mask_interval=2, asa_target_subspaces=2)  # fmt: skip
    model = peft_fx.get_peft_model(llama_again(), config)
    train(model, tmp_path, AllocatorCallback())
    allocator = model.base_model.allocators["default"]
    assert sum(s.learning.sum() for s in allocator.subspaces) == 2 < allocator.total
