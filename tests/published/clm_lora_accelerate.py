"""Causal LM with LoRA under Accelerate, generating at each epoch's end.

After huggingface/peft, examples/causal_language_modeling/peft_lora_clm_accelerate_ds_zero3_offload.py.
"""

import json

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    default_data_collator,
    get_linear_schedule_with_warmup,
    set_seed,
)

from peft_fx import LoraConfig, TaskType, get_peft_model

base, max_length, num_epochs = "llama", 16, 2
accelerator = Accelerator(cpu=True)
peft_config = LoraConfig(task_type=TaskType.CAUSAL_LM, inference_mode=False, r=8, lora_alpha=32, lora_dropout=0.1)
set_seed(42)

with open("sentences.json") as file:
    rows = json.load(file)
tokenizer = AutoTokenizer.from_pretrained(base)


def padded(prompt, answer):
    """Prompt and answer from the left edge of what is left over; the prompt is no label."""
    empty = max_length - len(prompt) - len(answer)
    return {
        "input_ids": [tokenizer.pad_token_id] * empty + prompt + answer,
        "attention_mask": [0] * empty + [1] * (max_length - empty),
        "labels": [-100] * (empty + len(prompt)) + answer,
    }


def prompt_of(row):
    return tokenizer(f"text : {row['sentence']} label :")["input_ids"]


def answer_of(row):
    return [*tokenizer(row["label"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


train_dataloader = DataLoader([padded(prompt_of(r), answer_of(r)) for r in rows["train"]], shuffle=True,
                              collate_fn=default_data_collator, batch_size=4)  # fmt: skip
eval_dataloader = DataLoader(
    [padded(prompt_of(r), []) for r in rows["test"]], collate_fn=default_data_collator, batch_size=4
)

model = AutoModelForCausalLM.from_pretrained(base)
model = get_peft_model(model, peft_config)
model.print_trainable_parameters()
trainable = model.get_nb_trainable_parameters()

optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
lr_scheduler = get_linear_schedule_with_warmup(
    optimizer=optimizer, num_warmup_steps=0, num_training_steps=len(train_dataloader) * num_epochs
)
model, train_dataloader, eval_dataloader, optimizer, lr_scheduler = accelerator.prepare(
    model, train_dataloader, eval_dataloader, optimizer, lr_scheduler
)
accelerator.print(model)

losses, generated = [], []
for _ in range(num_epochs):
    model.train()
    for batch in train_dataloader:
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    for batch in eval_dataloader:
        batch = {k: v for k, v in batch.items() if k != "labels"}
        with torch.no_grad():
            outputs = accelerator.unwrap_model(model).generate(**batch, synced_gpus=False, max_new_tokens=5)
        outputs = accelerator.pad_across_processes(outputs, dim=1, pad_index=tokenizer.pad_token_id)
        new = accelerator.gather_for_metrics(outputs)[:, max_length:].cpu().numpy()
        generated.extend(tokenizer.batch_decode(new, skip_special_tokens=True))

accelerator.wait_for_everyone()
model.save_pretrained("adapter")
accelerator.wait_for_everyone()

results = {"trainable": trainable, "losses": losses, "generated": generated}
