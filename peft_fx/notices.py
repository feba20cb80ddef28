"""Warnings that point at the line of the user's that led to them."""

from __future__ import annotations

import sys
import warnings

# packages whose frames are passed over: this one, and those whose functions call it
INSIDE = frozenset({__name__.partition(".")[0], "contextlib", "torch"})


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """`warnings.warn`, as from the nearest caller outside of this package and of torch."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in INSIDE:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
