"""What graphs over the same tensors share besides: a readers-writer lock, and the list of one another.

    forward     many at once; a graph module's `__call__` is one
    swapping    preparing other numbers: one thread at a time, forwards go on
    writing     putting them in place: after the forwards that run, before those that wait

So every forward sees the numbers from before a swap or those from after it, never some of each.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterable, Iterator

import torch
from torch import fx

from ..errors import GraphError
from .lazy import Lazy
from .summary import OURS, summary, summary_html


class Sharing:
    """One for all graphs derived from one another; a copy of a graph has one of its own."""

    def __init__(self):
        from torch._dynamo.eval_frame import skip_code  # slow to import

        for function in (Shared.__call__, Sharing.begin, Sharing.end, Lazy._generate, Lazy.recompile):
            skip_code(function.__code__)  # Dynamo, which meets them on its way to `forward`, lets them run as they are
        self.changed = threading.Condition()
        self.forwards: dict[int, int] = {}  # thread -> how many nested ones it is in
        self.waiting: set[int] = set()  # threads whose forward has to wait
        self.writer_waits = self.is_written = False
        self.swaps = threading.Lock()
        self.graphs: weakref.WeakSet[fx.GraphModule] = weakref.WeakSet()

    def __reduce__(self):
        return Sharing, ()

    def begin(self) -> None:
        """A forward begins: at once if its thread is in one already, else after the write that waits or goes on."""
        thread = threading.get_ident()
        with self.changed:
            if thread in self.forwards or not (self.writer_waits or self.is_written):
                self.forwards[thread] = self.forwards.get(thread, 0) + 1
                return
            self.waiting.add(thread)
            try:
                while thread in self.waiting:
                    self.changed.wait()
            except BaseException:  # an interrupt
                self.waiting.discard(thread)
                self.forwards.pop(thread, None)
                self.changed.notify_all()
                raise

    def end(self) -> None:
        thread = threading.get_ident()
        with self.changed:
            self.forwards[thread] -= 1
            if not self.forwards[thread]:
                del self.forwards[thread]
                self.changed.notify_all()

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """Around several calls that have to see the same numbers, or around code compiled from more than the graph."""
        self.begin()
        try:
            yield
        finally:
            self.end()

    @contextlib.contextmanager
    def swapping(self) -> Iterator[None]:
        """Raises GraphError inside a forward of the same thread, which could not end."""
        if threading.get_ident() in self.forwards:
            raise GraphError("adapters cannot be swapped or switched from inside a forward of a graph that has them")
        with self.swaps:
            yield

    @contextlib.contextmanager
    def between(self) -> Iterator[None]:
        """Inside the block the thread's own forward does not count: what is written is what that forward asks for itself."""
        thread = threading.get_ident()
        with self.changed:
            mine = self.forwards.pop(thread, 0)
            self.changed.notify_all()
        try:
            yield
        finally:
            if mine:
                with self.changed:
                    try:
                        self.changed.wait_for(lambda: not self.is_written)
                    finally:  # an interrupt: the forward ends all the same
                        self.forwards[thread] = mine

    @contextlib.contextmanager
    def writing(self, tensors: Iterable[torch.Tensor]) -> Iterator[None]:
        """Nothing reads `tensors` inside the block, on their devices neither."""
        devices = {t.device for t in tensors if t.device.type not in ("cpu", "meta")}
        try:
            with self.changed:
                self.writer_waits = True
                while self.forwards:
                    self.changed.wait()
                self.is_written = True
            synchronize(devices)  # forwards have returned, their kernels may run still
            yield
            synchronize(devices)  # the next forward may be on another stream
        finally:
            with self.changed:
                self.writer_waits = self.is_written = False
                self.forwards |= dict.fromkeys(self.waiting, 1)  # ahead of the next writer
                self.waiting.clear()
                self.changed.notify_all()

    @torch.no_grad()
    def put(self, values: dict[torch.Tensor, torch.Tensor]) -> None:
        """Other numbers into these tensors when no forward is going on, but for the thread's own, which asks for them."""
        if values:
            with self.between(), self.swapping(), self.writing(values):
                torch._foreach_copy_(list(values), list(values.values()))

    def add(self, *graphs: fx.GraphModule) -> None:
        with self.changed:
            self.graphs.update(graphs)

    def all(self) -> list[fx.GraphModule]:
        with self.changed:
            return list(self.graphs)


def synchronize(devices: Iterable[torch.device]) -> None:
    for device in devices:
        torch.accelerator.synchronize(device)


class Shared(Lazy):
    """A graph module whose calls are forwards to `Sharing`. Code that Dynamo made of such a call along with its caller's has
    no lock: its caller takes `forward()`. Printed, it is a summary; all of it is in `code`."""

    def __call__(self, *args, **kwargs):
        if torch.compiler.is_compiling():
            return super().__call__(*args, **kwargs)
        sharing = self.peft_fx.sharing
        sharing.begin()
        try:
            return super().__call__(*args, **kwargs)
        finally:
            sharing.end()

    def __str__(self) -> str:
        return summary(self) if OURS in self.meta else super().__repr__()

    __repr__ = __str__

    def _repr_html_(self) -> str | None:
        return summary_html(self) if OURS in self.meta else None
