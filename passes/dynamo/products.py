"""Large matrix products of a graph that Inductor is about to generate code for, as the operator that is fastest for them here."""

from __future__ import annotations

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx.experimental.symbolic_shapes import optimization_hint

from ...kernels import product

aten = torch.ops.aten


class Products(CustomGraphPass):
    """For Inductor's `post_grad_custom_pre_pass`: its graphs come functional and differentiated, forward and backward apart."""

    def __call__(self, graph: fx.Graph) -> None:
        for node in (*graph.find_nodes(op="call_function", target=aten.mm.default),
                     *graph.find_nodes(op="call_function", target=aten.addmm.default)):  # fmt: skip
            *bias, a, b = node.args
            if suits(*bias, a, b) and not node.kwargs:
                with graph.inserting_before(node):
                    new = graph.call_function(torch.ops.peft_fx.product.default, (a, b, *bias))
                new.meta = dict(node.meta)
                node.replace_all_uses_with(new)
                graph.erase_node(node)

    def uuid(self):
        return get_hash_for_files((__file__, product.__file__))


def options_with(mode: str | None, options: dict | None) -> dict:
    """torch.compile's `options` that stand for its mode and options (it takes one of them), with this pass where it helps."""
    chosen = {**torch._inductor.list_mode_options(mode or "default"), **(options or {})}
    return {"post_grad_custom_pre_pass": Products(), **chosen} if product.faster_here() else chosen


def suits(*operands: fx.Node) -> bool:
    """Whether the operator takes bias?, a and b of these metadata, and gains by it."""
    *bias, a, b = (n.meta["val"] for n in operands)
    if any(t.dtype != torch.float32 or t.device.type != "cpu" for t in (*bias, a, b)) or any(
        t.dim() != 1 for t in bias
    ):
        return False
    straight = a.is_contiguous() and (b.is_contiguous() or b.t().is_contiguous())
    return straight and product.worth_it(*(optimization_hint(n) for n in (*a.shape, b.shape[1])))
