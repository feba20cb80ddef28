"""Teach a model to classify sentences; the new head is trained and saved whole, beside the adapter.

    python examples/classify.py --model FacebookAI/roberta-base --data sentences.csv --out my-classifier

--data: a CSV file with the columns "sentence" and "label".
"""

import argparse
import csv

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from peft_fx import LoraConfig, PeftModel, get_peft_model


def main(model: str, data: str, out: str, epochs: int = 3, lr: float = 1e-3, batch: int = 8) -> dict:
    with open(data, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    labels = sorted({row["label"] for row in rows})
    tokenizer = AutoTokenizer.from_pretrained(model)
    names = {"num_labels": len(labels), "id2label": dict(enumerate(labels))}

    def base():
        torch.manual_seed(0)  # the head starts at random, and is in the adapter's files afterwards
        return AutoModelForSequenceClassification.from_pretrained(model, **names)

    def batches():
        for i in range(0, len(rows), batch):
            some = rows[i : i + batch]
            inputs = tokenizer([r["sentence"] for r in some], padding=True, return_tensors="pt")
            yield inputs, torch.tensor([labels.index(r["label"]) for r in some])

    tuned = get_peft_model(base(), LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules="all-linear"))
    tuned.print_trainable_parameters()
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(epochs):
        for inputs, wanted in batches():
            loss = tuned(**inputs, labels=wanted).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())

    tuned.save_pretrained(out)
    again = PeftModel.from_pretrained(base(), out).eval()
    with torch.no_grad():
        right = sum(int((again(**inputs).logits.argmax(-1) == wanted).sum()) for inputs, wanted in batches())
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; {right} of {len(rows)} training sentences right after a reload")
    return {"losses": losses, "right": right / len(rows)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="FacebookAI/roberta-base")
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", default="my-classifier")
    parser.add_argument("--epochs", type=int, default=3)
    given = parser.parse_args()
    main(given.model, given.data, given.out, given.epochs)
