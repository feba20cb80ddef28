"""Runs every method on every storage (tests/storage_cells.py) and writes what passes, beside what PEFT has.

    python tools/storage_table.py            all cells: peft_fx/cli/storage_cells.json and docs/storages.md; some minutes
    python tools/storage_table.py --page     docs/storages.md again, from the cells that there are

A test compares the names in the file with the methods and the schemes that there are: run this after adding one.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "storages.md"

# PEFT 0.21.2. Read from its dispatch code; bitsandbytes' columns run on the CPU, before a layer's first forward in evaluation,
# where the package repacks. A method or a scheme that is not here has no code there.
GENERIC = {"merge": "bnb4 bnb8 hqq torchao", "forward": "gptq awq aqlm eetq inc8 tinygemm"}
BY_ACCIDENT = {"forward": "bnb4 bnb8"}  # a layer of bitsandbytes' is an nn.Linear to it; a merge raises
PEFT = {
    "LORA": GENERIC,
    "DORA": {"merge": "bnb4 bnb8 hqq"},
    **{name: GENERIC for name in ("BOFT", "MISS", "OFT", "SHIRA", "VERA")},
    "MISS_BAT": {"merge": GENERIC["merge"]},
    "ADALORA": {"forward": "bnb4 bnb8 gptq"},
    "IA3": {"forward": "bnb4 bnb8"},
    "IA3_INPUT": {"forward": "bnb4 bnb8"},
    "HIRA": {"merge": "bnb4 bnb8"},
    "ROAD": {"merge": "bnb4 bnb8"},
    "PVERA": {"merge": "bnb8", "forward": "bnb4"},
    "RANDLORA": {"forward": "bnb4 bnb8"},
    "BEFT": {"merge": "bnb4 bnb8"},
    **{name: BY_ACCIDENT for name in ("C3A", "FOURIERFT", "GRALORA", "LILY", "UNILORA", "VBLORA", "WAVEFT")},
    **{name: {"forward": "bnb8"} for name in ("LOHA", "LOKR")},
    **{name: {"wrong": "bnb8"} for name in ("DEFT", "HRA", "PEANUT")},
}
NOTES = {
    "BEFT, C3A, FOURIERFT, GRALORA, LILY, LOHA, LOKR, UNILORA, VBLORA, WAVEFT": "have no code for bitsandbytes: its layers "
    "are torch's to them, and the forward happens to be right",
    "DEFT, HRA, PEANUT": "read the int8 codes as the weight",
    "PVERA": "merged into 4 bits, the next forward raises",
    "RANDLORA": "merges its factors in the wrong order",
    "torchao": "merges need a model that transformers quantized",
    "all merges": "into the packed weight alone; unmerge subtracts and rounds once more",
}

HEAD = """# Quantized weights

Written by `python tools/storage_table.py`, which runs every method on a small layer of every storage; `peft-fx methods --storage`
prints the whole table, with `--method` or `--scheme` step by step.

A quantized model is loaded as its package or transformers loads it, then captured, or wrapped by `get_peft_model`, like any
other:

```python
model = AutoModelForCausalLM.from_pretrained(name, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
graph = peft_fx.capture(model)
tuned = peft_fx.apply(graph, {"peft_type": "OFT", "target_modules": ["q_proj", "v_proj"]})
merged = peft_fx.merge(tuned, storage="dense")  # or "requantize", or "calibrated" with activations=
```

Checkpoints of GPTQ, AWQ, HQQ, AQLM and EETQ need no package: load them inside `with peft_fx.native_layers():`. What each
storage is, its packing and its formula, is said at the top of its file in `peft_fx/storage/`; which packages it was compared
with in [quantizers.md](quantizers.md), what the methods are in [methods.md](methods.md).

The oracle is the same model with the dequantized weights and the same adapter, every layer in the dtype in which its storage
computes: outputs and gradients equal but for the order of sums; merges the same rounding of the same sum; after unmerge, in a
`.pt2` read back and after a swap the same bits. *requantize* passes where what is kept is the storage's own rounding of the
merged weight; how much of an adapter that leaves is another matter: `peft_fx.merge_report`.
"""


def outcomes() -> dict[str, dict]:
    """scheme -> step -> "all", or who passes and why the others are refused."""
    sys.path.insert(0, str(ROOT / "tests"))
    from storage_cells import FAILED, STEPS
    from storage_cells import outcomes as run

    from peft_fx.storage.schemes import SCHEMES

    names = methods()
    found = {}
    for name in names:
        print(name, file=sys.stderr, flush=True)
        found[name] = run(name)
    failed = [(n, step, s, why) for n, steps in found.items() for step, row in steps.items() for s, why in row.items()
              if why.startswith(FAILED)]  # fmt: skip
    if failed:
        sys.exit("\n".join(": ".join(f) for f in failed))
    return {s: {step: cell_of({name: found[name][step][s] for name in names}) for step in STEPS} for s in SCHEMES}


def methods() -> list[str]:
    from peft_fx.cli.method_facts import names

    return names()


def cell_of(reasons: dict[str, str]) -> str | dict:
    """method -> "" or why it is refused, in short."""
    if not any(reasons.values()):
        return "all"
    refused: dict[str, list[str]] = {}
    for method, reason in reasons.items():
        if reason:
            refused.setdefault(reason, []).append(method)
    return {"passes": [m for m, reason in reasons.items() if not reason], "refused": refused}


def document(cells: dict[str, dict]) -> dict:
    peft = {m: {what: schemes.split() for what, schemes in pairs.items()} for m, pairs in PEFT.items()}
    return {"steps": [*next(iter(cells.values()))], "methods": methods(), "cells": cells, "peft": peft}


def markdown(held: dict) -> str:
    """The page: storages and steps, with how many methods pass; PEFT's beside them."""
    from peft_fx.storage.schemes import scheme

    total, notes = len(held["methods"]), {}
    lines = [row(["storage", "", *held["steps"], "PEFT: merges", "PEFT: forward alone"])]
    lines.append(row(["---"] * (len(held["steps"]) + 4)))
    for name, steps in held["cells"].items():
        counts = []
        for step, cell in steps.items():
            passing = total if cell == "all" else len(cell["passes"])
            counts.append(f"{passing}/{total}{refs(cell, step, notes, held['methods'])}")
        pefts = [
            str(sum(name in pairs.get(what, ()) for pairs in held["peft"].values())) for what in ("merge", "forward")
        ]
        lines.append(row([f"`{name}`", scheme(name).title, *counts, *pefts]))
    text = [HEAD, f"## Methods that pass, of {total}\n", "\n".join(lines)]
    text.append("\n" + "\n".join(f"{n}. *{step}*: {reason} ({names})" for (step, reason, names), n in notes.items()))
    text.append("\n## PEFT\n")
    text.append("What 0.21.2 has, read from its dispatch code; bitsandbytes' columns were run on the CPU.\n")
    text.append("\n".join(f"- {who}: {what}." for who, what in NOTES.items()))
    return "\n".join(text) + "\n"


def refs(cell: str | dict, step: str, notes: dict, methods: list[str]) -> str:
    """Numbers of the notes that say who is refused, and why."""
    if cell == "all":
        return ""
    found = []
    for reason, refused in cell["refused"].items():
        others = [m for m in methods if m not in refused]
        who = ", ".join(refused) if len(others) > len(refused) else f"all but {', '.join(others)}"
        found.append(notes.setdefault((step, reason, who), len(notes) + 1))
    return "".join(f" [{n}]" for n in found)


def row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    from peft_fx.cli.storages import FILE

    if "--page" not in sys.argv[1:]:
        FILE.write_text(json.dumps(document(outcomes()), indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(markdown(json.loads(FILE.read_text(encoding="utf-8"))), encoding="utf-8")
