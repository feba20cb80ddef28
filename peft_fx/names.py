"""Names as a set that is gone through, and shown, in one order: so nothing that follows from it depends on the process."""

from __future__ import annotations

from collections.abc import Iterator


class Names(set[str]):
    """A set of strings, sorted wherever it is read."""

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(super().__iter__()))

    def __repr__(self) -> str:
        return f"{{{', '.join(map(repr, self))}}}" if self else "set()"
