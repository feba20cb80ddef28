"""Refuse calls that would silently give another call's result.

Capture fixes more than the call's structure: constants (`n=3`, `mask=None`) and the sizes that the model's own code fixed,
e.g. by looping over a sequence. The graph runs with other ones too, and ignores them. One node checks them at each call.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...store.tensors import INPUTS, store_of
from ..core.base import Pass


@dataclass(frozen=True)
class CheckInputs(Pass):
    def call(self, gm):
        placeholders = gm.graph.find_nodes(op="placeholder")
        fixed = [(n, expected(n.meta.get("val"))) for n in placeholders]
        fixed = [(n, e) for n, e in fixed if not (isinstance(e, tuple) and set(e) <= {None})]
        if fixed:
            store_of(gm).inputs.expected = tuple((n.name, e) for n, e in fixed)
            first = next(n for n in gm.graph.nodes if n.op not in ("placeholder", "get_attr"))
            with gm.graph.inserting_before(first):
                node = gm.graph.call_module(INPUTS, tuple(n for n, _ in fixed))
            node.meta["val"] = None
        return len(fixed)


def expected(value):
    """Of a tensor its sizes, with None for those that may vary; of anything else the constant."""
    if isinstance(value, torch.Tensor):
        return tuple(s.node.maybe_as_int() if isinstance(s, torch.SymInt) else s for s in value.shape)
    return () if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)) else value
