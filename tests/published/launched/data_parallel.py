"""Training under `accelerate launch`, by any number of processes that divide the batch of eight."""

import json

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from peft_fx import PeftModel

accelerator = Accelerator(cpu=True)
set_seed(0)
model = AutoModelForCausalLM.from_pretrained("llama")
model = PeftModel.from_pretrained(model, "adapters/english", "english", is_trainable=True)
ids = torch.randint(4, 20, (32, 7), generator=torch.Generator().manual_seed(1))
data = DataLoader([{"input_ids": x, "labels": x} for x in ids], batch_size=8 // accelerator.num_processes)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
model, optimizer, data = accelerator.prepare(model, optimizer, data)

losses = []
model.train()
for _ in range(3):
    for batch in data:
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.gather(loss.detach()[None]).mean().item())

accelerator.wait_for_everyone()
accelerator.unwrap_model(model).save_pretrained("adapter", is_main_process=accelerator.is_main_process)
results = {"processes": accelerator.num_processes, "losses": losses}
if accelerator.is_main_process:
    with open("results.json", "w") as file:
        json.dump(results, file)
accelerator.end_training()
