"""What graphs over the same tensors share besides: a readers-writer lock, and the list of one another.

    forward     many at once; a graph module's `__call__` is one
    swapping    preparing other numbers: one thread at a time, forwards go on
    writing     putting them in place: after the forwards that run, before those that wait

So every forward sees the numbers from before a swap or those from after it, never some of each.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import weakref
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ..errors import GraphError
from .lazy import Lazy
from .summary import OURS, summary, summary_html
from .tensors import copy_all

if TYPE_CHECKING:
    from .modules import Store


class Forward:
    """A call that runs, held by the frame that it is called from.

    seen: what it acts with, once something has looked at it. compiled: whether a torch.compile is around it, whose guards look
    at what is published, frame by frame. What seen and rows are is the face's business (`hf/hosts/acting.py`).
    """

    __slots__ = ("__weakref__", "compiled", "rows", "seen")

    def __init__(self, compiled: bool):
        self.seen: Any = None
        self.rows: Any = None
        self.compiled = compiled


class Sharing:
    """One for all graphs derived from one another; a copy of a graph has one of its own.

    running: thread -> a weak reference to its outermost call. A frame that an exception ends where nobody expects one takes
    its call with it.
    """

    def __init__(self):
        from torch._dynamo.eval_frame import skip_code  # slow to import

        for function in (Shared.__call__, Sharing.begin, Sharing.end, Lazy._generate, Lazy.recompile):
            skip_code(function.__code__)  # Dynamo, which meets them on its way to `forward`, lets them run as they are
        # entered in C, where no interrupt comes between; a Condition's own way is Python's
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self.running: dict[int, weakref.ref[Forward]] = {}
        self.waiting: dict[int, weakref.ref[Forward]] = {}  # calls that begin after the write, before the next one
        self.writer_waits = False
        self.swaps = threading.RLock()
        self.graphs: weakref.WeakSet[fx.GraphModule] = weakref.WeakSet()

    def __reduce__(self):
        return Sharing, ()

    def call(self) -> Forward | None:
        """The one that this thread is in."""
        found = self.running.get(threading.get_ident())
        return None if found is None else found()

    def begin(self, compiled: bool = False) -> Forward | None:
        """A call begins: at once, or after the write that waits or goes on. None if its thread is in one already."""
        if self.call() is not None:
            return None
        forward, thread = Forward(compiled), threading.get_ident()
        with self.lock:
            if self.writer_waits:
                self.waiting[thread] = weakref.ref(forward)
                while thread in self.waiting:
                    self.changed.wait()
            else:
                self.running[thread] = weakref.ref(forward)
        return forward

    def end(self, forward: Forward | None) -> None:
        """The outermost call ends; the others end with it."""
        if forward is not None:
            with self.lock:
                self.running.pop(threading.get_ident(), None)
                if self.writer_waits:
                    self.changed.notify_all()

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """Around several calls that have to see the same numbers, or around code compiled from more than the graph."""
        forward = None
        try:
            forward = self.begin()
            yield
        finally:
            self.end(forward)

    @contextlib.contextmanager
    def swapping(self) -> Iterator[None]:
        """One thread at a time. Raises GraphError inside a forward of the same thread, which could not end."""
        self.refuse_inside()
        with self.swaps:
            yield

    @contextlib.contextmanager
    def publishing(self) -> Iterator[None]:
        """Around what calls take a snapshot of: at once, but between two compiled calls."""
        with self.lock:
            if not any(call is not None and call.compiled for call in [found() for found in self.running.values()]):
                yield
                return
        with self.writing(()):
            yield

    def refuse_inside(self) -> None:
        if self.call() is not None:
            raise GraphError(
                "adapters cannot be changed from inside a forward of a model or graph that has them: do it between two calls"
            )

    @contextlib.contextmanager
    def writing(self, tensors: Iterable[torch.Tensor]) -> Iterator[None]:
        """Nothing reads `tensors` inside the block, on their devices neither. An interrupt waits for its end."""
        self.refuse_inside()
        devices = {t.device for t in tensors if t.device.type not in ("cpu", "meta")}
        try:
            with self.lock:
                self.writer_waits = True
                while any(call() is not None for call in list(self.running.values())):
                    self.changed.wait(0.1)  # a call that an interrupt ended says nothing
                with uninterrupted():
                    synchronize(devices)  # forwards have returned, their kernels may run still
                    yield
                    synchronize(devices)  # the next forward may be on another stream
        finally:
            with uninterrupted(), self.lock:
                self.writer_waits = False
                self.running |= self.waiting
                self.waiting.clear()
                self.changed.notify_all()

    @contextlib.contextmanager
    def between(self) -> Iterator[None]:
        """Inside the block the thread's own forward does not count: what is written is what that forward asks for itself."""
        thread = threading.get_ident()
        with self.lock:
            mine = self.running.pop(thread, None)
            self.changed.notify_all()
        try:
            yield
        finally:
            if mine is not None:
                with self.lock:
                    self.running[thread] = mine

    @torch.no_grad()
    def put(self, values: dict[torch.Tensor, torch.Tensor]) -> None:
        """Other numbers into these tensors when no forward is going on, but for the thread's own, which asks for them."""
        if values:
            with self.between(), self.swapping(), self.writing(values):
                copy_all(values.items())

    def add(self, *graphs: fx.GraphModule) -> None:
        with self.lock:
            self.graphs.update(graphs)

    def all(self) -> list[fx.GraphModule]:
        with self.lock:
            return list(self.graphs)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C inside the block is heard at its end. Python raises it in the main thread alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard: list[tuple] = []
    before = signal.signal(signal.SIGINT, lambda *args: heard.append(args))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if heard and callable(before):
            before(*heard[0])


def synchronize(devices: Iterable[torch.device]) -> None:
    for device in devices:
        torch.accelerator.synchronize(device)


class Shared(Lazy):
    """A graph module whose calls are forwards to `Sharing`. Code that Dynamo made of such a call along with its caller's has
    no lock: its caller takes `forward()`. Printed, it is a summary; all of it is in `code`."""

    peft_fx: Store  # not by `store_of`: Dynamo would meet that in a call, and compile it

    def __call__(self, *args, **kwargs):
        if torch.compiler.is_dynamo_compiling():
            return super().__call__(*args, **kwargs)
        sharing, forward = self.peft_fx.sharing, None
        try:
            forward = sharing.begin()
            return super().__call__(*args, **kwargs)
        finally:
            sharing.end(forward)

    def __deepcopy__(self, memo):
        with self.peft_fx.sharing.forward():
            return super().__deepcopy__(memo)

    def train(self, mode: bool = True):
        self.peft_fx.train(mode)  # first, since it may refuse
        return super().train(mode)

    def __str__(self) -> str:
        return summary(self) if OURS in self.meta else super().__repr__()

    __repr__ = __str__

    def _repr_html_(self) -> str | None:
        return summary_html(self) if OURS in self.meta else None
