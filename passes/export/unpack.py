"""Dequantize packed weights by plain ATen operators: for runtimes that know none of ours.

peft_fx::dequantize([packed...], format)  ->  the scheme's own definition, traced
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import fx

from ...errors import GraphError
from ...kernels.packed import of
from ...store.closing import packed_weights
from ..core.base import Pass
from ..core.fakes import fake_mode_of
from ..core.splice import Splicer


@dataclass(frozen=True)
class Unpack(Pass):
    """The graph has no mode nodes any more: formats are literals."""

    def call(self, gm):
        splice = Splicer(gm, fake_mode_of(gm))
        weights = packed_weights(gm.graph)
        for node in weights:
            tensors, text = cast("list[fx.Node]", node.args[0]), cast(str, node.args[1])
            storage, f = of(text)
            (dense,) = splice(lambda *t, s=storage, f=f: (s.dequantize(t, f),), ("unpack", text), tensors, node, {})
            node.replace_all_uses_with(dense, propagate_meta=False)
            gm.graph.erase_node(node)
        return len(weights)

    def ensures(self, gm):
        if left := packed_weights(gm.graph):
            raise GraphError(f"{len(left)} packed weights are left, first {left[0].name}")
