"""Drop what export checks of a weight that the model casts.

    _assert_tensor_metadata(W, dtype, ...); linear(x, to(W, dtype), b)  ->  linear(x, to(W, dtype), b)

It says of a parameter, dense or packed, what that always is, and would count as a reader of it for which there is no
activation form.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from ..core.base import Pass
from ..core.nodes import input_of
from ..match.operators import schema_name
from ..match.readers import DEQUANTIZE


@dataclass(frozen=True)
class DropWeightChecks(Pass):
    def call(self, gm):
        found = [
            n for n in gm.graph.nodes if schema_name(n) == "aten::_assert_tensor_metadata" and is_weight(input_of(n))
        ]
        for node in found:
            gm.graph.erase_node(node)
        return len(found)


def is_weight(node: fx.Node) -> bool:
    return node.op == "get_attr" or node.target is DEQUANTIZE
