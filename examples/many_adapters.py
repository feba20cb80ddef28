"""Serve many adapters from one compiled graph: switched as data, or each row of a batch its own.

    python examples/many_adapters.py --model HuggingFaceTB/SmolLM2-135M-Instruct adapters/loops adapters/classes

The folders are PEFT's, from whichever program wrote them.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import peft_fx


@torch.no_grad()
def main(model: str, folders: list[str], prompt: str = "The for statement") -> dict:
    tokenizer = AutoTokenizer.from_pretrained(model)
    graph = peft_fx.capture(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval())
    names = [Path(folder).name for folder in folders]
    call = dict(tokenizer([prompt] * (len(names) + 1), return_tensors="pt"))
    call = {name: call[name] for name in ("input_ids", "attention_mask")}

    # One acts at a time. A free slot takes an adapter while the server runs.
    tuned = peft_fx.load_adapter(graph, folders[0], names[0])
    slots = peft_fx.reserve(tuned, slots=len(names) + 1, max_rank=64)
    served = peft_fx.compile(slots)
    alone = {names[0]: served(**call).logits}
    with torch.compiler.set_stance("fail_on_recompile"):
        for name, folder in zip(names[1:], folders[1:], strict=True):
            peft_fx.hotswap(served, folder, name)
            peft_fx.switch(served, name)
            alone[name] = served(**call).logits
        peft_fx.switch(served, None)
        alone["base"] = served(**call).logits

    # All act at once: row i of the batch through adapter i, the last through none.
    for name, folder in zip(names[1:], folders[1:], strict=True):
        tuned = peft_fx.load_adapter(tuned, folder, name)
    mixed = peft_fx.compile(peft_fx.mixed_batch(tuned, names))
    together = mixed(**call, adapter_ids=torch.tensor([*range(len(names)), -1])).logits
    for row, name in enumerate([*names, "base"]):
        difference = float((together[row] - alone[name][row]).abs().max())
        print(
            f"{name}: next token {tokenizer.decode(together[row, -1].argmax())!r}; alone or in the batch {difference:.0e}"
        )
    return {"alone": alone, "together": together}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("folders", nargs="+")
    given = parser.parse_args()
    main(given.model, given.folders)
