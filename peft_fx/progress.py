"""What takes long says what it does: one spinner on stderr, in a terminal only. PEFT_FX_PROGRESS=0 switches it off."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.status import Status

PROGRESS = "PEFT_FX_PROGRESS"
PATIENCE = 1.0  # seconds before a call from Python shows anything

status: ContextVar[Status | None] = ContextVar("status", default=None)  # of the outermost call


@contextlib.contextmanager
def working(what: str, after: float = PATIENCE) -> Iterator[None]:
    """A spinner that says `what` while the block runs, once it has run for `after` seconds. Inside another it is a step."""
    if status.get() is not None or not wanted():
        step(what)
        yield
        return
    from rich.console import Console

    spinner = Console(stderr=True).status(dim(what), spinner="dots")
    timer = threading.Timer(after, spinner.start)
    timer.daemon = True
    token = status.set(spinner)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        status.reset(token)
        spinner.stop()


def step(what: str) -> None:
    """Says what is being done now, if anything is shown."""
    if (spinner := status.get()) is not None:
        spinner.update(dim(what))


def wanted() -> bool:
    terminal = sys.stderr is not None and sys.stderr.isatty()
    return terminal and os.environ.get(PROGRESS, "1") != "0"


def dim(text: str) -> str:
    return f"[dim]{text}[/]"
