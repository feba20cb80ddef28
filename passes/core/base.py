"""What a pass is, and the manager that runs a tuple of them.

A pass rewrites one GraphModule's graph in place and reports what it changed; the graph is valid before and after.
Verbs run passes on a graph they have just copied, so a failing pass never damages the caller's.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import fx

from ...errors import GraphError
from ...store.lazy import Lazy, graph_to_read


@dataclass(frozen=True)
class Pass:
    """A pass: a frozen dataclass whose fields are its options.

    requires / ensures raise GraphError if the graph does not hold what the pass needs / promises.
    """

    def idle(self, gm: fx.GraphModule) -> bool:
        """Whether there is nothing to do: then neither the call nor a check is needed, and no copy of the graph."""
        return False

    def requires(self, gm: fx.GraphModule) -> None:
        """Checks the graph before the call."""

    def call(self, gm: fx.GraphModule) -> int:
        """Rewrites `gm.graph` in place; returns how many places changed."""
        raise NotImplementedError

    def ensures(self, gm: fx.GraphModule) -> None:
        """Checks the graph after the call."""

    @property
    def name(self) -> str:
        return type(self).__name__


@dataclass(frozen=True)
class Report:
    """What one pass did: places changed, seconds, and operator counts that differ (op -> after - before)."""

    name: str
    changed: int
    seconds: float
    op_difference: dict[str, int]


# Names of passes to leave out, and a callback per report; set through `settings`.
_disabled: ContextVar[frozenset[str]] = ContextVar("disabled", default=frozenset())
_observer: ContextVar[Callable[[Report, fx.GraphModule], None] | None] = ContextVar("observer", default=None)


class settings:
    """`with settings(disable=("Linearise",), on_report=print): ...` around any verb."""

    def __init__(self, disable: Iterable[str] = (), on_report: Callable[[Report, fx.GraphModule], None] | None = None):
        self.values: tuple[tuple[ContextVar, Any], ...] = ((_disabled, frozenset(disable)), (_observer, on_report))

    def __enter__(self):
        self.tokens = [(var, var.set(value)) for var, value in self.values]
        return self

    def __exit__(self, *exc):
        for var, token in self.tokens:
            var.reset(token)


def run(passes: Iterable[Pass], gm: fx.GraphModule) -> tuple[Report, ...]:
    """Runs the passes in order on `gm`, in place, linting after each; its code is outdated then, or generated anew.

    Raises GraphError naming the pass when its requires / ensures or the lint fails; what the call itself raises passes
    through with the pass in its notes.
    """
    with without_collector():
        reports = tuple(report_of(p, gm) for p in passes if p.name not in _disabled.get())
        renew_code(gm)
    return reports


def renew_code(gm: fx.GraphModule) -> None:
    """Regions get their code at once, since they can be called without the module around them."""
    if not isinstance(gm, Lazy):
        gm.recompile()  # regions too
        return
    for region in regions(gm):
        region.recompile()
    gm._outdate()


def report_of(p: Pass, gm: fx.GraphModule) -> Report:
    """Runs one pass between its checks."""
    start = time.perf_counter()
    if p.idle(gm):
        return seen(Report(p.name, 0, time.perf_counter() - start, {}), gm)
    before = op_counts(gm)
    with reported(p, "does not get what it requires"):
        p.requires(gm)
    try:
        changed = p.call(gm)
    except Exception as error:
        error.add_note(f"in pass {p.name}")
        raise
    with reported(p, "left an invalid graph"):
        gm.graph.lint()
        p.ensures(gm)
    seconds = time.perf_counter() - start
    after = op_counts(gm)
    difference = {op: after[op] - before[op] for op in sorted(before | after) if after[op] != before[op]}
    return seen(Report(p.name, changed, seconds, difference), gm)


def seen(report: Report, gm: fx.GraphModule) -> Report:
    """Shows a report to the observer."""
    if observer := _observer.get():
        observer(report, gm)
    return report


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """No garbage collection meanwhile: thousands of new nodes would set off full sweeps that find nothing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def reported(p: Pass, what: str) -> Iterator[None]:
    """Whatever a check raises becomes a GraphError that names the pass."""
    try:
        yield
    except (RuntimeError, ValueError, AssertionError) as error:  # GraphError is a RuntimeError
        raise GraphError(f"pass {p.name} {what}: {error}") from error


def op_counts(gm: fx.GraphModule) -> Counter:
    """Operator name -> number of call nodes, regions included."""
    counts = Counter(op_name(n) for n in graph_to_read(gm).nodes if n.op not in ("placeholder", "output", "get_attr"))
    for region in regions(gm):
        counts += op_counts(region)
    return counts


def op_name(node: fx.Node) -> str:
    target = node.target
    return target if isinstance(target, str) else getattr(target, "__name__", None) or str(target)


def regions(gm: fx.GraphModule) -> list[fx.GraphModule]:
    """The sub-graphs that higher-order operators of `gm` run."""
    names = {n.target for n in graph_to_read(gm).nodes if n.op == "get_attr"}
    return [m for name, m in gm._modules.items() if name in names and isinstance(m, fx.GraphModule)]
