"""Fields of configs that check themselves, `r: int = rank(8)`, and what files may say in them. A default of None allows None."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import field
from typing import Any

from .checks import check_choice, check_count, check_positive, check_rank, number_that
from .errors import UnsupportedError
from .missing import Init, not_yet


def rank(default: int | None) -> Any:
    """An integer from 1 to MAX_RANK."""
    return field(default=default, metadata={"check": check_rank})


def count(default: int) -> Any:
    """An integer of 1 or more."""
    return field(default=default, metadata={"check": check_count})


def checked(default: Any, holds: Callable[[Any], bool], expected: str) -> Any:
    """A field whose value must make `holds` true."""
    return field(default=default, metadata={"check": number_that(holds, expected)})


def probability(default: float = 0.0) -> Any:
    return checked(default, lambda p: 0.0 <= p < 1.0, "0 <= p < 1")


def positive(default: float | None) -> Any:
    return field(default=default, metadata={"check": check_positive})


def nonnegative(default: float | None) -> Any:
    return checked(default, lambda v: v >= 0, "0 or more")


def one_of(*choices: Any) -> Any:
    """A field with one of these values; the first is the default."""
    return field(default=choices[0], metadata={"check": check_choice(choices)})


def start(*choices: Any, missing: Callable[[Any], Init | None]) -> Any:
    """`one_of`, for how an adapter begins. missing: what a value stands for, if PEFT has it and this version does not."""
    check = check_choice(choices)

    def check_start(what: str, value: Any) -> None:
        if isinstance(value, Begun):
            return
        if asked := missing(value):
            raise UnsupportedError(f"{what}={value!r}: {not_yet(asked.name)}")
        check(what, value)

    return field(default=choices[0], metadata={"check": check_start, "start": choices})


def pattern_field(check: Callable[[str, Any], None] | None = None, **default: Any) -> Any:
    """A name-regex -> value dict field. check: of each value, with what to call it. default: `field`'s, where not {}."""

    def check_values(what: str, values: dict | None) -> None:
        for key, value in (values or {}).items():
            if check is not None:
                check(f"{what}[{key!r}]", value)

    return field(**(default or {"default_factory": dict}), metadata={"check": check_values} if check else {})


class Begun:
    """A value from a file that says how its adapter began, in a way in which none can begin here."""

    def unmarked(self) -> Any:
        """The value as the file has it."""
        raise NotImplementedError


class BegunText(Begun, str):
    def unmarked(self) -> str:
        return str(self)


class BegunDict(Begun, dict):
    def unmarked(self) -> dict:
        return dict(self)


def begun(f: dataclasses.Field, value: Any) -> Any:
    """A file's value of a field, marked where the adapter has begun in a way that is missing here."""
    if value in f.metadata.get("start", (value,)):
        return value
    kinds: dict[type, Callable[[Any], Begun]] = {str: BegunText, dict: BegunDict}
    return next((kind(value) for plain, kind in kinds.items() if isinstance(value, plain)), value)


def default_of(f: dataclasses.Field) -> Any:
    return f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
