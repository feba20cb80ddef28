"""Fold an adapter into the weights, take it out again bit for bit, and export a file that runs without the model's code.

    python examples/merge_and_export.py --model HuggingFaceTB/SmolLM2-135M-Instruct adapters/loops --out loops

Writes loops.pt2, and the folder loops with the merged model.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import peft_fx


@torch.no_grad()
def main(model: str, adapter: str, out: str, prompt: str = "The for statement") -> dict:
    tokenizer = AutoTokenizer.from_pretrained(model)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    graph = peft_fx.capture(base)
    tuned = peft_fx.load_adapter(graph, adapter)
    inputs = tokenizer([prompt] * 2, return_tensors="pt")
    call = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    expected = tuned(**call).logits

    merged = peft_fx.merge(tuned)
    back = peft_fx.unmerge(merged)
    exact = all(torch.equal(a, b) for a, b in zip(back.parameters(), tuned.parameters(), strict=True))
    print(f"merged: {float((merged(**call).logits - expected).abs().max()):.0e} off; unmerged bit for bit: {exact}")

    peft_fx.export(merged, f"{out}.pt2")  # a torch.export program: loads without transformers
    loaded = torch.export.load(f"{out}.pt2").module()
    difference = float((loaded(**call).logits - merged(**call).logits).abs().max())
    print(f"{out}.pt2: {difference:.0e} off")

    # The same as a model folder, for programs that know no adapters.
    peft_fx.PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(out)
    tokenizer.save_pretrained(out)
    whole = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    return {"expected": expected, "exact": exact, "exported": difference, "whole": whole(**call).logits}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("adapter")
    parser.add_argument("--out", default="merged")
    given = parser.parse_args()
    main(given.model, given.adapter, given.out)
