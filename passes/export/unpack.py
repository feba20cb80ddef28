"""Dequantize packed weights by plain ATen operators: for runtimes that know none of ours.

peft_fx::dequantize([packed...], format)  ->  the scheme's own definition, traced
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import fx

from ...errors import GraphError
from ...kernels.packed import of
from ...notices import warn
from ...store.closing import packed_weights, readers
from ..core.base import Pass
from ..core.fakes import fake_mode_of
from ..core.splice import Splicer


@dataclass(frozen=True)
class Unpack(Pass):
    """The graph has no mode nodes any more: formats are literals. Warns where products with rounded inputs become dense ones."""

    def call(self, gm):
        splice = Splicer(gm, fake_mode_of(gm))
        weights = packed_weights(gm.graph)
        if rounded := with_rounded_inputs(weights):
            warn(
                f"products with inputs rounded to 8 bits that become those with the dense weights: {len(rounded)}, first "
                f"{rounded[0].name}. The program's results differ from the graph's by that rounding; a file of "
                "peft_fx.export without decompose, read back by peft_fx.load, keeps it"
            )
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


def with_rounded_inputs(weights: list[fx.Node]) -> list[fx.Node]:
    """The products for which the schemes of their packed weights have more to do than to dequantize."""
    found = []
    for weight in weights:
        storage, f = of(cast(str, weight.args[1]))
        if storage.rounds_inputs(f):
            found += [reader for reader, _ in readers(weight) if reader.target is torch.ops.aten.linear.default]
    return found
