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


class Entrances:
    """Those of one model and its backend."""

    def __init__(self, model: nn.Module, backend: Backend):
        self.model, self.backend = model, backend
        self.opened: dict[nn.Module, None] = {}
        self.lock, self.calls = threading.Lock(), 0
        self.inside = False  # whether some thread is in an adapted call; a plain attribute, so that Dynamo can guard it

    def open(self, paths: Iterable[str]) -> None:
        """From now on calls of the modules at these paths, and of all that contain them, run adapted."""
        parts = (path.split(".") if path else [] for path in paths)
        wanted = dict.fromkeys(".".join(p[:i]) for p in parts for i in range(len(p) + 1))
        for module in map(self.model.get_submodule, wanted):
            if module not in self.opened:
                self.opened[module] = None
                module._compiled_call_impl = self.entrance(module)

    def close(self) -> None:
        """Calls run as before."""
        for module in self.opened:
            module._compiled_call_impl = None
        self.opened.clear()

    def count(self, by: int) -> None:
        with self.lock:
            self.calls += by
            self.inside = self.calls > 0

    def entrance(self, module: nn.Module) -> Callable:
        """What is called in place of the module's own `__call__`, hooks included in either case."""
        compiled: list[Callable] = []

        def outside(*args, **kwargs):
            if not compiled:  # at the first call from outside: most modules never get one
                compiled.append(torch.compile(module._call_impl, backend=self.backend, recompile_limit=GRAPHS,
                                              isolate_recompiles=True))  # fmt: skip
            self.count(1)
            try:
                with torch._dynamo.config.patch(LIMITS):
                    return compiled[0](*args, **kwargs)
            finally:
                self.count(-1)

        apart = torch._dynamo.disable(outside, recursive=False)

        def call(*args, **kwargs):
            if not torch.compiler.is_compiling():
                return outside(*args, **kwargs)
            # In a graph of the user's own torch.compile the adapters would be missing: that graph breaks here.
            return module._call_impl(*args, **kwargs) if self.inside else apart(*args, **kwargs)

        return call
