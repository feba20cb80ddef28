"""Classes of sentences with LoRA and a head that is trained whole, evaluated at each epoch's end and after loading.

After huggingface/peft, examples/sequence_classification/LoRA.ipynb.
"""

import json

import torch
from torch.optim import AdamW
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    get_linear_schedule_with_warmup,
    set_seed,
)

from peft_fx import LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model

base, num_epochs, peft_type = "roberta", 6, PeftType.LORA
set_seed(42)
peft_config = LoraConfig(task_type="SEQ_CLS", inference_mode=False, r=8, lora_alpha=16, lora_dropout=0.1)

with open("sentences.json") as file:
    rows = json.load(file)
tokenizer = AutoTokenizer.from_pretrained(base, padding_side="right")
CLASSES = sorted({row["label"] for row in rows["train"]})


def collate_fn(examples):
    batch = tokenizer([e["sentence"] for e in examples], padding="longest", return_tensors="pt")
    batch["labels"] = torch.tensor([CLASSES.index(e["label"]) for e in examples])
    return batch


train_dataloader = DataLoader(rows["train"], shuffle=True, collate_fn=collate_fn, batch_size=4)
eval_dataloader = DataLoader(rows["test"], shuffle=False, collate_fn=collate_fn, batch_size=4)

model = AutoModelForSequenceClassification.from_pretrained(base, return_dict=True, num_labels=len(CLASSES))
model = get_peft_model(model, peft_config)
model.print_trainable_parameters()
print(model)
trainable = model.get_nb_trainable_parameters()

optimizer = AdamW(params=model.parameters(), lr=3e-3)
lr_scheduler = get_linear_schedule_with_warmup(
    optimizer=optimizer,
    num_warmup_steps=0.06 * (len(train_dataloader) * num_epochs),
    num_training_steps=len(train_dataloader) * num_epochs,
)


def evaluated(model):
    model.eval()
    right, found = 0, []
    for batch in eval_dataloader:
        with torch.no_grad():
            outputs = model(**batch)
        found += outputs.logits.tolist()
        right += (outputs.logits.argmax(dim=-1) == batch["labels"]).sum().item()
    return {"accuracy": right / len(rows["test"]), "logits": found}


model.to("cpu")
losses, metrics = [], []
for _ in range(num_epochs):
    model.train()
    for batch in train_dataloader:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    metrics.append(evaluated(model))

model.save_pretrained("adapter")

config = PeftConfig.from_pretrained("adapter")
same_type = config.peft_type == peft_type
inference_model = AutoModelForSequenceClassification.from_pretrained(
    config.base_model_name_or_path, num_labels=len(CLASSES)
)
inference_model = PeftModel.from_pretrained(inference_model, "adapter")
metrics.append(evaluated(inference_model.to("cpu")))

results = {"trainable": trainable, "losses": losses, "metrics": metrics, "same_type": same_type}
