"""Fine-tune a language model with transformers' Trainer, save the adapter, load it again and generate.

    python examples/finetune.py --model HuggingFaceTB/SmolLM2-135M-Instruct --text my-notes.txt --out my-adapter

A script that is written for PEFT looks the same but for the first import. --model: a folder or a Hub id. --text: a UTF-8
file; without it, what Python's own `help()` says of its statements.
"""

import argparse
from pathlib import Path
from pydoc_data.topics import topics

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, default_data_collator

from peft_fx import AutoPeftModelForCausalLM, LoraConfig, get_peft_model


def blocks(tokenizer, text: str, length: int) -> list[dict[str, torch.Tensor]]:
    """The text's tokens in blocks of equal length, as a Trainer takes them."""
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[0]
    rows = ids[: len(ids) // length * length].view(-1, length)
    return [{"input_ids": row, "labels": row} for row in rows]


def main(model: str, out: str, text: str, steps: int = 50, length: int = 128, lr: float = 4e-4) -> dict:
    tokenizer = AutoTokenizer.from_pretrained(model)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tuned = get_peft_model(
        base, LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear")
    )
    tuned.print_trainable_parameters()

    arguments = TrainingArguments(
        output_dir=f"{out}-checkpoints",
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=lr,
        logging_steps=max(1, steps // 10),
        save_strategy="no",
        report_to=[],
    )
    data = blocks(tokenizer, text, length)
    trainer = Trainer(tuned, arguments, train_dataset=data, data_collator=default_data_collator)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    tuned.save_pretrained(out)  # two files in PEFT's format, and a model card
    again = AutoPeftModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    prompt = tokenizer.decode(data[0]["input_ids"][:8])
    ids = tokenizer(prompt, return_tensors="pt").input_ids.to(again.device)
    written = again.generate(input_ids=ids, max_new_tokens=24, do_sample=False)
    print(tokenizer.decode(written[0]))
    return {"losses": losses, "tokens": written, "trained": tuned.eval(), "loaded": again}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--out", default="my-adapter")
    parser.add_argument("--steps", type=int, default=50)
    given = parser.parse_args()
    words = given.text.read_text(encoding="utf-8") if given.text else "\n".join(topics.values())
    main(given.model, given.out, words, given.steps)
