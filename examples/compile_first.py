"""Fine-tune a captured graph with compiled code, then change adapters in it: nothing is compiled twice.

    python examples/compile_first.py --model HuggingFaceTB/SmolLM2-135M-Instruct --out adapters

The two adapters learn two chapters of Python's language reference, which `help()` ships with.
"""

import argparse
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import peft_fx


def fine_tune(graph, rows: torch.Tensor, steps: int, lr: float) -> list[float]:
    """AdamW over what requires grad; rows: int64 token ids, (blocks, length)."""
    optimizer = torch.optim.AdamW([p for p in graph.parameters() if p.requires_grad], lr=lr)
    losses = []
    for step in range(steps):
        ids = rows[torch.arange(4 * step, 4 * step + 4) % len(rows)]
        logits = graph(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main(model: str, out: str, steps: int = 20, length: int = 96) -> dict:
    tokenizer = AutoTokenizer.from_pretrained(model)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    graph = peft_fx.capture(base)  # once; batch and length may vary

    losses, folders = {}, {}
    for name, topic, rank in (("loops", "for", 16), ("classes", "class", 8)):
        ids = tokenizer(topics[topic] * 4, return_tensors="pt", add_special_tokens=False).input_ids[0]
        rows = ids[: len(ids) // length * length].view(-1, length)
        tuned = peft_fx.apply(graph, peft_fx.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
        losses[name] = fine_tune(peft_fx.compile(tuned.train()), rows, steps, lr=4e-4)
        folders[name] = peft_fx.save_adapter(tuned, Path(out) / name)
        print(f"{name}: loss {losses[name][0]:.3f} -> {losses[name][-1]:.3f}")

    # Slots of the greatest rank: every adapter fits into the same tensors.
    tuned = peft_fx.prepare_hotswap(peft_fx.load_adapter(graph, folders["loops"]), max_rank=16)
    served = peft_fx.compile(tuned.eval())
    call = {"input_ids": rows[:2], "attention_mask": torch.ones_like(rows[:2])}
    outputs = {}
    with torch.no_grad():
        outputs["loops"] = served(**call).logits
        with torch.compiler.set_stance("fail_on_recompile"):
            report = peft_fx.hotswap(served, folders["classes"])
            outputs["classes"] = served(**call).logits
    print(f"swapped {report.elements:,} numbers in {1e3 * report.seconds:.0f} ms, 0 recompiles")
    return {"losses": losses, "outputs": outputs, "graph": graph, "folders": folders, "call": call}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--out", default="adapters")
    parser.add_argument("--steps", type=int, default=20)
    given = parser.parse_args()
    main(given.model, given.out, given.steps)
