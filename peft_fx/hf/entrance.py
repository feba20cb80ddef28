"""Modules whose calls run through a backend, from wherever they are called.

Every module above or at a target is an entrance: `model(...)`, the encoder that `generate` calls on its own,
`model.model.layers[0](...)`. A call from outside is compiled; inside a call that is being compiled they are one graph with it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

import torch
from torch import nn

from ..verbs.backend import Backend

# Dynamo gives up after a few graphs for one function and runs it as it is written, without adapters and without an error.
GRAPHS = 1 << 16
LIMITS = {"fail_on_recompile_limit_hit": True, "accumulated_recompile_limit": GRAPHS}


class Gate:
    """Whether some thread is in an adapted call, for code that Dynamo traces: a plain attribute, so that it can guard it."""

    def __init__(self):
        self.lock, self.calls, self.inside = threading.Lock(), 0, False

    def count(self, by: int) -> None:
        with self.lock:
            self.calls += by
            self.inside = self.calls > 0


def open_entrances(modules: Iterable[nn.Module], backend: Backend) -> None:
    """From now on calls of these modules run adapted."""
    gate = Gate()
    for module in modules:
        module._compiled_call_impl = entrance(module, backend, gate)


def close_entrances(modules: Iterable[nn.Module]) -> None:
    for module in modules:
        module._compiled_call_impl = None


def entrance(module: nn.Module, backend: Backend, gate: Gate) -> Callable:
    """What is called in place of the module's own `__call__`, hooks included in either case."""
    compiled: list[Callable] = []

    def outside(*args, **kwargs):
        if not compiled:
            compiled.append(
                torch.compile(module._call_impl, backend=backend, recompile_limit=GRAPHS, isolate_recompiles=True)
            )
        gate.count(1)
        try:
            with torch._dynamo.config.patch(LIMITS):
                return compiled[0](*args, **kwargs)
        finally:
            gate.count(-1)

    apart = torch._dynamo.disable(outside, recursive=False)

    def call(*args, **kwargs):
        if not torch.compiler.is_compiling():
            return outside(*args, **kwargs)
        # In a graph of the user's own torch.compile the adapters would be missing: that graph breaks here.
        return module._call_impl(*args, **kwargs) if gate.inside else apart(*args, **kwargs)

    return call


def above(model: nn.Module, paths: Iterable[str]) -> list[nn.Module]:
    """The modules at these paths and all that contain them."""
    parts = (path.split(".") if path else [] for path in paths)
    wanted = dict.fromkeys(".".join(p[:i]) for p in parts for i in range(len(p) + 1))
    return list({id(m): m for m in map(model.get_submodule, wanted)}.values())
