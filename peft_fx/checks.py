"""Checks of values in configs: each raises one of `RecipeError`'s kinds, with what came and what was expected."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from .errors import RecipeError, WrongTypeError
from .suggestions import did_you_mean

MAX_RANK = 65536  # an adapter file that asks for more is damaged or hostile
# annotation of a field -> what its value must be; other annotations are checked where they are used
PLAIN_TYPES: dict[str, type | tuple[type, ...]] = {"bool": bool, "int": int, "float": (int, float)}


def check_names(what: str, value: Any, string: bool) -> None:
    """Raises RecipeError unless `value` is None, a list of strings or, where `string`, one string."""
    if value is None or (string and isinstance(value, str)):
        return
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise WrongTypeError(f"{what}: expected a list of names{' or a string' if string else ''}, got {value!r}")


def check_type(what: str, value: Any, annotation: str | type) -> None:
    """Raises RecipeError unless a field annotated as a plain number or boolean holds one, and a finite one."""
    name = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")
    expected = PLAIN_TYPES.get(name)
    if expected is None:
        return
    boolean = isinstance(value, bool) and expected is not bool
    if boolean or not isinstance(value, expected) or not math.isfinite(value):  # type: ignore[arg-type]
        raise WrongTypeError(f"{what}: expected {name}, got {value!r}")


def check_rank(what: str, value: Any) -> None:
    """Raises RecipeError unless `value` is a usable rank."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= MAX_RANK:
        raise RecipeError(f"{what}: expected an integer from 1 to {MAX_RANK}, got {value!r}")


def check_count(what: str, value: Any) -> None:
    """Raises RecipeError unless `value` is a positive integer."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise RecipeError(f"{what}: expected a positive integer, got {value!r}; nearest valid: 1")


def number_that(holds: Callable[[Any], bool], expected: str) -> Callable[[str, Any], None]:
    """A check of numbers: raises RecipeError unless `holds` is true of the value."""

    def check(what: str, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not holds(value):
            raise RecipeError(f"{what}: expected {expected}, got {value!r}")

    return check


def check_choice(choices: tuple) -> Callable[[str, Any], None]:
    """A check: raises RecipeError unless the value is one of these."""

    def check(what: str, value: Any) -> None:
        if not any(value is c or (value == c and type(value) is type(c)) for c in choices):
            names = [c for c in choices if isinstance(c, str)]
            raise RecipeError(f"{what}={value!r}: expected one of {choices}{did_you_mean(value, names)}")

    return check


check_positive = number_that(lambda v: v > 0, "a number above 0")
