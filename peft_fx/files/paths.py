"""What a caller gives as a path."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import WrongTypeError


def as_path(given: object, what: str) -> Path:
    """`given` as a Path. what: what was expected, e.g. "a folder to write to". Raises WrongTypeError."""
    if not isinstance(given, (str, os.PathLike)):
        raise WrongTypeError(f"expected {what}, got {type(given).__name__}")
    return Path(given)
