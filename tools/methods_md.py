"""Writes docs/methods.md: what each method can do, asked of the code, beside what PEFT has (tools/peft_methods.py).

    python tools/methods_md.py            write it
    python tools/methods_md.py --check    exit 1 if the file is not what the code gives

A test runs the check: write the page after adding a method or changing what one can do.
"""

import sys
from pathlib import Path

import peft_methods

from peft_fx.cli.method_facts import KINDS, OPTIONS, SIZE, Facts, facts, names
from peft_fx.methods import INTERNAL

FILE = Path(__file__).resolve().parent.parent / "docs" / "methods.md"
MARKS = {"activation": "**x**", "weight": "W", "": ""}
HEAD = f"""# Methods

Written by `python tools/methods_md.py`; the left part is asked of the code, as `peft-fx methods` does.

**x**: acts on activations. W: the weight is rewritten in the forward. Empty: refused, with a reason. Whatever has a merge
has an unmerge that changes no bit. *swap*: what can be swapped in place without a recompilation: adapters of the *same*
shape or of *any* rank up to the slot's; *+*: also adapters that leave out some of the targets. *start*: `=` where a fresh
adapter changes nothing. *trained*: elements on a {SIZE}x{SIZE} layer (or what the method takes) with default options.
Linear stands for transformers' `Conv1D` and MultiheadAttention's projections as well, *expert* for 3-D parameters by
`target_parameters`.
"""
UNMERGES = {"subtract": "subtracts", "inverse": "inverts", "divide": "divides", "exact": "exact", "no": "none"}


def markdown() -> str:
    found = [facts(name) for name in names()]
    columns = ["method", *KINDS, "merge", "swap", "start", "trained", "PEFT: layer types", "PEFT: unmerge"]
    lines = [row(columns), row(["---"] * len(columns)), *(row(line(f)) for f in found)]
    text = [HEAD, "\n".join(lines), "\n## Where they come from\n"]
    text.append("\n".join(f"- {f.name}: {f.title}{chosen(f)}{note(f.name)}" for f in found))
    missing = sorted(peft_methods.METHODS.keys() - {f.name for f in found})
    if missing:
        text += ["\n## What PEFT has and this version has not\n", ", ".join(missing)]
    return "\n".join(text) + "\n"


def line(f: Facts) -> list[str]:
    types, merge, unmerge, _ = peft_methods.METHODS.get(f.name, ((), "", "", ""))
    return [
        f.name,
        *(MARKS[form] for form in f.kinds.values()),
        "yes" if f.merge else "no",
        ("any" if f.ranks else "same") + (" +" if f.neutral else ""),
        {True: "=", False: "changes", None: "?"}[f.identity],
        f"{f.parameters:,}",
        " ".join(types),
        UNMERGES.get(unmerge, "") if merge != "no" else "no merge",
    ]


def chosen(f: Facts) -> str:
    """How a variant is asked for, which is no peft_type."""
    if f.name not in INTERNAL:
        return ""
    options = ", ".join(f"{k}={v!r}" for k, v in OPTIONS[f.name].items())
    return f" Chosen by {f.config.peft_type} with `{options}`."


def note(name: str) -> str:
    return f" In PEFT: {peft_methods.NOTES[name]}." if name in peft_methods.NOTES else ""


def row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    if "--check" not in sys.argv[1:]:
        FILE.write_text(markdown(), encoding="utf-8")
    elif FILE.read_text(encoding="utf-8") != markdown():
        sys.exit(f"{FILE.name} is not what the code gives: run python tools/methods_md.py")
