"""Trace a pure function once per signature and copy its nodes into a graph.

The signature is every argument's shape (symbols included), stride, dtype, device and requires_grad, plus the static part
given by the caller. Tracing runs `make_fx(pre_dispatch=True)` under the graph's own fake mode, so that copied nodes keep
the graph's symbols. What tracing would lose or freeze is refused: grad-mode switches, tensor constants, device literals.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from ...errors import GraphError
from ...store.tensors import MODE
from .nodes import results_of

TAG = "peft_fx"
TRACING = threading.RLock()  # torch has one stack of pre-dispatch modes for all threads


class Splicer:
    """Copies traced functions into `gm.graph`. cache: traced graphs, to be shared by graphs under one fake mode."""

    def __init__(self, gm: fx.GraphModule, fake_mode, cache: dict[Hashable, fx.Graph] | None = None):
        self.gm, self.fake_mode = gm, fake_mode
        self.cache = {} if cache is None else cache

    def __call__(
        self,
        function: Callable,
        static: Hashable,
        arguments: Sequence[fx.Node | None],
        like: fx.Node,
        tag: dict,
        after=True,
    ) -> list[Any]:
        """Inserts `function(*arguments)` next to the node `like` and returns its result nodes (argument nodes unchanged), None
        for what is None.

        like: site whose module stack the new nodes take. tag: plain data, stored in `node.meta["custom"]["peft_fx"]`.
        """
        values = [None if a is None else a.meta["val"] for a in arguments]
        key = (static, tuple(map(signature, values)))
        traced = self.cache.get(key)
        if traced is None:  # the table may forget it again at any time
            traced = self.cache[key] = self.trace(function, values, tag)
        return self.copy(traced, arguments, like, tag, after)

    def trace(self, function, values, tag) -> fx.Graph:
        present = [i for i, v in enumerate(values) if v is not None]

        def call(*tensors):
            full = [None] * len(values)
            for i, t in zip(present, tensors, strict=True):
                full[i] = t
            return function(*full)

        with TRACING, torch.enable_grad(), self.fake_mode:
            traced = make_fx(call, pre_dispatch=True)(*(values[i] for i in present))
        refuse_lossy(traced.graph, tag)
        traced.graph.eliminate_dead_code()  # dtype arithmetic such as torch.promote_types is traced too
        return traced.graph

    def copy(self, traced: fx.Graph, arguments, like: fx.Node, tag: dict, after: bool) -> list[Any]:
        graph = self.gm.graph
        present = [a for a in arguments if a is not None]
        env = dict(zip((n for n in traced.nodes if n.op == "placeholder"), present, strict=True))
        provenance: dict[str, Any] = {k: like.meta[k] for k in ("nn_module_stack", "stack_trace") if k in like.meta}
        point = graph.inserting_after(like) if after else graph.inserting_before(like)
        with point:
            for node in traced.nodes:
                if node.op in ("placeholder", "output"):
                    continue
                new = env[node] = graph.node_copy(node, env.__getitem__)
                new.meta = {**provenance, "val": node.meta.get("val"), "custom": {TAG: {**tag, "role": "body"}}}
                self.follow_mode(new)
                if after:
                    point.__exit__(None, None, None)
                    point = graph.inserting_after(new)
                    point.__enter__()
        return [None if n is None else env[n] for n in results_of(traced)]

    def follow_mode(self, node: fx.Node) -> None:
        """A literal `train=True` in a method (its dropout) follows the graph's mode."""
        if not isinstance(node.target, torch._ops.OpOverload):
            return
        for i, argument in enumerate(node.target._schema.arguments):
            if argument.name in ("train", "training") and i < len(node.args) and node.args[i] is True:
                node.update_arg(i, mode_node(self.gm, True, False))


def mode_node(gm: fx.GraphModule, train_value, eval_value) -> fx.Node:
    """The node that yields `train_value` in training and `eval_value` in evaluation; one per pair and graph."""
    for node in gm.graph.nodes:
        if node.op == "call_module" and node.target == MODE and same_literals(node.args, (train_value, eval_value)):
            return node
    first = next(n for n in gm.graph.nodes if n.op not in ("placeholder", "get_attr"))
    with gm.graph.inserting_before(first):
        node = gm.graph.call_module(MODE, (train_value, eval_value))
    node.meta["val"] = train_value
    return node


def same_literals(a: tuple, b: tuple) -> bool:
    return a == b and [type(x) for x in a] == [type(x) for x in b]


def signature(value) -> Hashable:
    if not isinstance(value, torch.Tensor):
        return repr(value)
    return sizes(value.shape), sizes(value.stride()), value.dtype, value.device, value.requires_grad


def sizes(values: Sequence[int | torch.SymInt]) -> tuple:
    """Numbers as they are, symbolic ones by their expression: their text takes ten times longer."""
    return tuple(s.node.expr if isinstance(s, torch.SymInt) else s for s in values)


def refuse_lossy(graph: fx.Graph, tag: dict) -> None:
    """Raises GraphError for what a copied graph would silently lose."""
    for node in graph.nodes:
        if node.op == "get_attr":
            raise GraphError(f"{tag}: the function holds a tensor constant; pass it in as a tensor of the method")
        if node.target is torch._C._set_grad_enabled:
            raise GraphError(f"{tag}: the function switches grad mode; use .detach() instead of torch.no_grad()")
        if node.op == "call_function" and any(isinstance(v, torch.device) for v in node.kwargs.values()):
            raise GraphError(f"{tag}: {node.target} creates a tensor on a literal device; use x.new_zeros and the like")
