"""Graph module -> ExportedProgram by repairing the signature instead of exporting again (0.24 s against 8.2 s, 30 layers).

    get_attr of a parameter / buffer  ->  placeholder in front of the user's inputs, with its InputSpec

Everything else a program needs is on the graph already: `val` on every node, the pytree specs in its codegen, the range
constraints kept from capture.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import fx, nn
from torch._export.verifier import TrainingIRVerifier
from torch.export import ExportedProgram, ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ConstantArgument,
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    SymIntArgument,
    TensorArgument,
)
from torch.utils._pytree import TreeSpec

from ...errors import GraphError
from ...store.lazy import copy_graph
from ...store.tensors import ROOT, get_tensor, tensor_of
from ..core.base import regions
from ..core.fakes import fake_mode_of, fake_of
from ..core.nodes import calling, results_of
from ..match.readers import tensor_nodes


def lift(gm: fx.GraphModule, range_constraints: dict) -> ExportedProgram:
    """The program that `gm`'s graph is; shares `gm`'s tensors. The graph must have no call_module nodes."""
    graph = copy_graph(gm.graph)
    info = calling(gm.graph)
    users = [n for n in graph.nodes if n.op == "placeholder"]
    specs: list[InputSpec] = []
    state: dict[str, torch.Tensor] = {}
    constants: dict[str, Any] = {}
    persistent = set(gm.state_dict(keep_vars=True))
    read = tensor_nodes(graph)
    unread = {
        name: unread_node(graph, gm, name) for name in persistent - read.keys() if not name.startswith(f"{ROOT}.")
    }
    named = [(name, node, get_tensor(gm, name)) for name, node in (read | dict(sorted(unread.items()))).items()]
    lifted = [(name, node, t) for name, node, t in named if t is not None]
    for name, node, tensor in sorted(lifted, key=lambda item: kind_of(item[2], item[0] in persistent)[0]):
        _, kind, stays = kind_of(tensor, name in persistent)
        placeholder = replace_by_placeholder(
            graph, node, users[0] if users else graph.output_node(), PREFIX[kind], name
        )
        specs.append(
            InputSpec(kind, TensorArgument(placeholder.name), name, stays if kind is InputKind.BUFFER else None)
        )
        (state if stays or kind is InputKind.PARAMETER else constants)[name] = tensor
    specs += [InputSpec(InputKind.USER_INPUT, argument(n), None) for n in users]
    output = graph.output_node()
    flat = results_of(graph)
    output.args = (flat,)
    outputs = [OutputSpec(OutputKind.USER_OUTPUT, argument(n), None) for n in flat]
    graph.set_codegen(fx.CodeGen())
    for node in graph.nodes:
        if node.op == "call_module":
            raise GraphError(
                f"cannot export {node.format_node()}: only operators and parameters have a place in a program"
            )
    root = nn.Module()
    for region in regions(gm):
        name = next(n for n, m in gm._modules.items() if m is region)
        root.add_module(name, region)
    signature = ModuleCallSignature([s.arg for s in specs if s.kind is InputKind.USER_INPUT], [s.arg for s in outputs],
                                    info.in_spec, cast(TreeSpec, info.out_spec))  # fmt: skip
    return ExportedProgram(
        root=fx.GraphModule(root, graph),
        graph=graph,
        graph_signature=ExportGraphSignature(specs, outputs),
        state_dict=state,
        range_constraints=range_constraints,
        module_call_graph=[ModuleCallEntry("", signature)],
        constants=constants,
        verifiers=[TrainingIRVerifier],
    )


def unread_node(graph: fx.Graph, gm: fx.GraphModule, name: str) -> fx.Node:
    """A node for a tensor that no operator reads: it belongs to the model's state dict all the same."""
    with graph.inserting_before(next(iter(graph.nodes))):
        node = graph.get_attr(name)
    node.meta["val"] = fake_of(fake_mode_of(gm), tensor_of(gm, name))
    return node


PREFIX = {InputKind.PARAMETER: "p_", InputKind.BUFFER: "b_", InputKind.CONSTANT_TENSOR: "c_"}


def kind_of(tensor: torch.Tensor, persistent: bool) -> tuple[int, InputKind, bool]:
    """(order among the inputs, kind, whether it is in the state dict)."""
    if isinstance(tensor, nn.Parameter):
        return 0, InputKind.PARAMETER, True
    return 1, InputKind.BUFFER, persistent


def replace_by_placeholder(graph: fx.Graph, node: fx.Node, before: fx.Node, prefix: str, name: str) -> fx.Node:
    with graph.inserting_before(before):
        placeholder = graph.placeholder(prefix + name.replace(".", "_"))
    placeholder.meta = dict(node.meta)
    node.replace_all_uses_with(placeholder, propagate_meta=False)
    graph.erase_node(node)
    return placeholder


def argument(node):
    """How a program's signature names an input or output."""
    if not isinstance(node, fx.Node):
        return ConstantArgument(name="", value=node)
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return TensorArgument(node.name)
    if isinstance(value, torch.SymInt):
        return SymIntArgument(node.name)
    return ConstantArgument(node.name, value)
