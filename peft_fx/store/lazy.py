"""A graph module that makes its code, and a copy of a graph that it shares, only for who asks for them.

    `forward`, `code`   generated from the graph at the first call or look; passes only say that they are outdated
    `graph`             of a module that runs a kept graph: a copy, made for who wants to change it

A kept graph is one that nobody changes, so that many modules can run it: the base's, or what a verb derived from it.
"""

from __future__ import annotations

import copy
import linecache
import threading
import weakref
from typing import TYPE_CHECKING, Any, cast

from torch import fx
from torch.fx.graph_module import _loader

from .closing import close, packed_weights

if TYPE_CHECKING:
    from torch.fx.node import Argument

# Generating code renames nodes meanwhile: two threads must not do it for one graph.
LOCK = threading.RLock()
GENERATED = "<eval_with_key>"  # how torch's names for the files of generated code begin, each there once


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy with its own nodes; `meta` is copied one level deep, the call structure (codegen) is shared."""
    new = fx.Graph(tracer_cls=graph._tracer_cls)
    result, output = cast("tuple[Argument, fx.Node]", new.graph_copy(graph, {}, return_output_node=True))
    new.output(result).meta = copy.copy(output.meta)
    new._codegen = graph._codegen
    return new


class Forgetful(fx.GraphModule):
    """A graph module whose source goes with its code: torch keeps all that it ever generated, for tracebacks."""

    def recompile(self):
        made = super().recompile()
        code = type(self).forward.__code__
        if code.co_filename.startswith(GENERATED):
            weakref.finalize(code, forget_source, code.co_filename).atexit = False
        return made


def forget_source(name: str) -> None:
    _loader.eval_cache.pop(name, None)
    linecache.cache.pop(name, None)


class Lazy(Forgetful):
    """_kept: the graph that it runs, or began with if it has a copy of its own by now; None if it never had one to keep.

    Underscores, as in torch's own classes: a model may have modules and parameters of any other name.
    """

    _kept: fx.Graph | None = None

    def _keep(self, graph: fx.Graph | None = None) -> None:
        """Runs `graph`, which nobody changes from now on; without one, the graph that it has."""
        self._kept, self._graph = graph_to_read(self) if graph is None else graph, None
        self._outdate()

    def _outdate(self) -> None:
        """The code is generated anew when it is asked for."""
        if "forward" in vars(type(self)):
            del type(self).forward

    # GraphModule keeps its graph here, and reads it wherever it needs one.
    @property
    def _graph(self) -> fx.Graph:
        with LOCK:
            if self.__dict__["_graph"] is None:
                own = self.__dict__["_graph"] = copy_graph(graph_to_read(self))
                own.owning_module = self
            return self.__dict__["_graph"]

    @_graph.setter
    def _graph(self, graph: fx.Graph | None) -> None:
        before = self.__dict__.get("_graph")
        if before is not None:
            before.owning_module = None  # a graph waits for the garbage collector, and would keep the module's tensors
        self.__dict__["_graph"] = graph

    @property
    def forward(self) -> Any:  # type: ignore[override]  # of the class as long as there is none
        self._generate()
        return self.forward  # the class's own by now

    def _generate(self) -> None:
        """Makes the code, unless it is there."""
        with LOCK:
            if "forward" not in vars(type(self)):
                self.recompile()

    def recompile(self):
        with LOCK:
            own = self.__dict__["_graph"]
            try:
                self.__dict__["_graph"] = closed(graph_to_read(self))
                return super().recompile()
            finally:
                self.__dict__["_graph"] = own

    @property
    def code(self) -> str:
        self._generate()
        return super().code

    def __deepcopy__(self, memo):
        self.graph  # noqa: B018  now it has one of its own
        memo[id(self._kept)] = self._kept
        new = cast(Lazy, super().__deepcopy__(memo))
        new._kept = self._kept
        return new

    def __reduce__(self):
        self.graph  # noqa: B018
        return super().__reduce__()


def closed(graph: fx.Graph) -> fx.Graph:
    """The graph from which code is made: a copy where weights are packed (`closing.py`)."""
    if packed_weights(graph):
        graph = copy_graph(graph)
        close(graph)
    return graph


def graph_to_read(gm: fx.GraphModule) -> fx.Graph:
    """The graph that `gm` runs, not to be changed."""
    return gm.__dict__["_graph"] or vars(gm)["_kept"]
