"""Causal LM with LoRA on embeddings of a vocabulary that grew, under the Trainer.

After huggingface/peft, examples/causal_language_modeling/peft_lora_clm_with_additional_tokens.ipynb.
"""

import json

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from peft_fx import LoraConfig, PeftModel, get_peft_model

base, max_length = "llama", 18
NEW = ["<|text|>", "<|label|>", "<|end|>"]
set_seed(42)

tokenizer = AutoTokenizer.from_pretrained(base, eos_token="<|end|>", additional_special_tokens=NEW)
model = AutoModelForCausalLM.from_pretrained(base)
model.resize_token_embeddings(len(tokenizer))

config = LoraConfig(
    r=8, lora_alpha=16, lora_dropout=0.0, target_modules=["embed_tokens", "lm_head", "q_proj", "v_proj"]
)
model = get_peft_model(model, config)
model.print_trainable_parameters()
print(model)
trainable = model.get_nb_trainable_parameters()

with open("sentences.json") as file:
    rows = json.load(file)


def padded(row):
    prompt = tokenizer(f"<|text|> {row['sentence']} <|label|>")["input_ids"]
    answer = [*tokenizer(row["label"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    empty = max_length - len(prompt) - len(answer)
    return {
        "input_ids": [tokenizer.pad_token_id] * empty + prompt + answer,
        "attention_mask": [0] * empty + [1] * (max_length - empty),
        "labels": [-100] * (empty + len(prompt)) + answer,
    }


training_args = TrainingArguments(
    output_dir="run", num_train_epochs=2, save_total_limit=5, per_device_train_batch_size=4, warmup_steps=2,
    weight_decay=0.0001, dataloader_drop_last=True, logging_steps=1, learning_rate=1e-2, gradient_checkpointing=True,
    gradient_checkpointing_kwargs={"use_reentrant": False}, remove_unused_columns=False, use_cpu=True, report_to=[],
    disable_tqdm=True,
)  # fmt: skip
trainer = Trainer(model=model, args=training_args, train_dataset=[padded(r) for r in rows["train"]],
                  data_collator=default_data_collator)  # fmt: skip
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

batch = tokenizer(f"<|text|> {rows['test'][0]['sentence']} <|label|>", return_tensors="pt")
sampling = dict(max_new_tokens=6, do_sample=True, temperature=0.2, top_p=0.95, top_k=50,
                eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)  # fmt: skip
model.eval()
set_seed(1)
generated = model.generate(**batch, **sampling)

trainer.model.save_pretrained("adapter")

inference_model = AutoModelForCausalLM.from_pretrained(base)
inference_model.resize_token_embeddings(len(tokenizer))
inference_model = PeftModel.from_pretrained(inference_model, "adapter")
inference_model.eval()
set_seed(1)
again = inference_model.generate(**batch, **sampling)
with torch.no_grad():
    logits = inference_model(**batch).logits

results = {
    "trainable": trainable, "losses": losses, "generated": generated.tolist(), "again": again.tolist(),
    "logits": logits.tolist(),
}  # fmt: skip
