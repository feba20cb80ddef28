"""What somebody who mistyped a name may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# what these are called elsewhere -> what they are called here, where there is such a name
ELSEWHERE = {
    "alpha": "lora_alpha", "dim": "r", "dropout": "lora_dropout", "lora_r": "r", "lora_rank": "r", "modules": "target_modules",
    "network_alpha": "lora_alpha", "network_dim": "r", "rank": "r", "targets": "target_modules",
}  # fmt: skip


def lookalikes(name: str, known: Iterable[str], number: int, cutoff: float) -> tuple[str, ...]:
    """Up to `number` of the known names that look like `name`, whatever their case, best first. cutoff: of difflib's ratio."""
    by_text: dict[str, str] = {}
    for k in known:
        by_text.setdefault(k.lower(), k)
    # to difflib "lroa" is nearer to "road" than to "lora"
    swapped = [t for t in by_text if sorted(t) == sorted(name.lower())]
    found = dict.fromkeys([*swapped, *difflib.get_close_matches(name.lower(), by_text, number, cutoff)])
    return tuple(by_text[t] for t in found)[:number]


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """The end of a message: "; did you mean 'LORA'?", or "" where nothing looks like it."""
    if not isinstance(name, str):
        return ""
    known = list(known)
    found = [ELSEWHERE[name]] if ELSEWHERE.get(name) in known else lookalikes(name, known, 1, 0.6)
    return f"; did you mean {found[0]!r}?" if found else ""
