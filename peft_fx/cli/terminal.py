"""Streams and errors: results on stdout, everything else on stderr, an error is one line there and exit code 2."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from typing import Any, cast

import typer
from rich.console import Console
from typer.core import TyperGroup

from .. import progress
from ..errors import PeftFxError

UsageError = cast(
    type[typer.BadParameter], typer.BadParameter.__base__
)  # typer keeps it in different places, depending on its version
TRACEBACK = "PEFT_FX_TRACEBACK"
PLAIN_WIDTH = 120  # of tables that go to a file or a pipe, unless COLUMNS says otherwise


class OneLineErrors(TyperGroup):
    """Exit codes: 0, 2 for what the user can mend, 1 for a fault of ours, 130 when interrupted."""

    def main(self, *args: Any, standalone_mode: bool = True, **options: Any) -> None:
        try:
            code = super().main(*args, **options, standalone_mode=False)  # type: ignore[misc]  # it comes by name
        except UsageError as error:
            fail(error.format_message(), 2)
        except PeftFxError as error:
            fail(str(error), 2)
        except typer.Abort:
            sys.exit(130)
        except Exception as error:  # nobody above us could show it in one line
            fail(f"internal error: {type(error).__name__}: {error}; set {TRACEBACK}=1 to see where", 1)
        sys.exit(code if isinstance(code, int) else 0)


def fail(message: str, code: int) -> None:
    """Prints the message as one line, preceded by the traceback if the user asked for it, and exits."""
    if os.environ.get(TRACEBACK, "0") not in ("", "0"):
        traceback.print_exc()
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    print(f"peft-fx: error: {'; '.join(lines) or 'no message'}", file=sys.stderr)
    sys.exit(code)


def stdout() -> Console:
    """Colours in a terminal only; sized to it."""
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else PLAIN_WIDTH
    return Console(width=width, highlight=False, soft_wrap=False)


@contextlib.contextmanager
def working(what: str) -> Iterator[None]:
    """A spinner on stderr while the block runs, if stderr is a terminal; warnings of libraries are kept off it."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    bars = not are_progress_bars_disabled()
    disable_progress_bars()
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), progress.working(what, after=0):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        if bars:
            enable_progress_bars()
