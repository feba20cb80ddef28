"""Labels as text, by an encoder and a decoder with LoRA.

After huggingface/peft, examples/conditional_generation/peft_lora_seq2seq.ipynb.
"""

import json

import torch
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    default_data_collator,
    get_linear_schedule_with_warmup,
    set_seed,
)

from peft_fx import LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model

base, max_length, num_epochs = "mt5", 12, 2
set_seed(42)

peft_config = LoraConfig(task_type=TaskType.SEQ_2_SEQ_LM, inference_mode=False, r=8, lora_alpha=32, lora_dropout=0.1)
model = AutoModelForSeq2SeqLM.from_pretrained(base)
model = get_peft_model(model, peft_config)
model.print_trainable_parameters()
trainable = model.get_nb_trainable_parameters()

with open("sentences.json") as file:
    rows = json.load(file)
tokenizer = AutoTokenizer.from_pretrained(base)


def encoded(row):
    found = tokenizer(row["sentence"], max_length=max_length, padding="max_length", truncation=True)
    labels = tokenizer(row["label"], max_length=3, padding="max_length", truncation=True)["input_ids"]
    return {**found, "labels": [-100 if t == tokenizer.pad_token_id else t for t in labels]}


train_dataloader, eval_dataloader = (
    DataLoader([encoded(r) for r in rows[s]], shuffle=s == "train", collate_fn=default_data_collator, batch_size=4)
    for s in ("train", "test")
)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
lr_scheduler = get_linear_schedule_with_warmup(
    optimizer=optimizer, num_warmup_steps=0, num_training_steps=len(train_dataloader) * num_epochs
)

model = model.to("cpu")
losses, eval_losses = [], []
for _ in range(num_epochs):
    model.train()
    for batch in train_dataloader:
        loss = model(**batch).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
    model.eval()
    predictions = []
    for batch in eval_dataloader:
        with torch.no_grad():
            outputs = model(**batch)
        eval_losses.append(outputs.loss.item())
        predictions.extend(tokenizer.batch_decode(outputs.logits.argmax(-1).numpy(), skip_special_tokens=True))
accuracy = sum(p.strip() == r["label"] for p, r in zip(predictions, rows["test"], strict=True)) / len(predictions)

peft_model_id = f"{base}_adapter"
model.save_pretrained(peft_model_id)

config = PeftConfig.from_pretrained(peft_model_id)
model = AutoModelForSeq2SeqLM.from_pretrained(config.base_model_name_or_path)
model = PeftModel.from_pretrained(model, peft_model_id)
model.eval()
inputs = tokenizer(rows["test"][3]["sentence"], return_tensors="pt")
with torch.no_grad():
    generated = model.generate(input_ids=inputs["input_ids"], max_new_tokens=10)

results = {
    "trainable": trainable, "losses": losses, "eval_losses": eval_losses, "predictions": predictions,
    "accuracy": accuracy, "generated": generated.tolist(),
}  # fmt: skip
