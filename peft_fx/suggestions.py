"""What somebody who mistyped a name may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

CUTOFF = 0.5  # of difflib's ratio: two letters swapped in a name of four still count


def lookalikes(name: str, known: Iterable[str], number: int = 1) -> tuple[str, ...]:
    """Up to `number` of the known names that look like `name`, whatever their case, best first."""
    by_text: dict[str, str] = {}
    for k in known:
        by_text.setdefault(k.lower(), k)
    return tuple(by_text[t] for t in difflib.get_close_matches(name.lower(), by_text, number, CUTOFF))


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """The end of a message: "; did you mean 'LORA'?", or "" where nothing looks like it."""
    found = lookalikes(name, known) if isinstance(name, str) else ()
    return f"; did you mean {found[0]!r}?" if found else ""
