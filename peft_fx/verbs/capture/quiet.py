"""What torch.export says on the screen beside its errors is said by ours, once, in fewer words."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from types import TracebackType

# They speak of sizes that were fixed, and of guards that failed.
LOGGERS = ("torch.export._trace", "torch._export.non_strict_utils", "torch.fx.experimental.symbolic_shapes")


def below_critical(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.CRITICAL


@contextlib.contextmanager
def quiet_export() -> Iterator[None]:
    """Without torch's warnings about what it captures, and without the graph that it prints when it fails.

    A logger that was asked to say more, by TORCH_LOGS say, goes on.
    """
    from torch.export import _trace  # brings Dynamo along

    quiet = [logger for logger in map(logging.getLogger, LOGGERS) if logger.getEffectiveLevel() >= logging.WARNING]
    for logger in quiet:
        logger.addFilter(below_critical)
    vars(_trace)["print"] = lambda *values, **options: None  # of that module alone: all that it prints is the graph
    try:
        yield
    finally:
        vars(_trace).pop("print", None)
        for logger in quiet:
            logger.removeFilter(below_critical)


def brief(error: BaseException) -> BaseException:
    """The error with the frames of the model's code and the last one of torch's, and without what it was raised from.

    Python shows a cause before the error that came of it: torch's two hundred lines would hide ours.
    """
    frames, frame = [], error.__traceback__
    while frame is not None:
        package = frame.tb_frame.f_globals.get("__name__", "").partition(".")[0]
        if package not in ("torch", __name__.partition(".")[0]) or frame.tb_next is None:
            frames.append(frame)
        frame = frame.tb_next
    short = None
    for frame in reversed(frames):
        short = TracebackType(short, frame.tb_frame, frame.tb_lasti, frame.tb_lineno)
    error.__cause__ = None  # and no context is shown
    return error.with_traceback(short)
