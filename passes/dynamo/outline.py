"""Cut a flat graph into its repeated blocks, one class for equal ones, so that each is compiled once.

    cut      the nodes of every module in a list (`layers.3`) are one contiguous run; where no two of a list are equal, the
             lists inside them are cut instead; what is left between the runs is glue
    equal    the same operators, literals, shapes, dtypes, requires_grad and data flow, node by node; never names alone
    build    a block takes the place of the module that it was, with that module's parameters, and reads its adapters'
             tensors where they are; everything else that it needs is an argument

Integers that follow from the inputs, and values of `peft_fx.mode` and the like, are computed once, ahead of all blocks:
left in the first block that needs them they would make it unlike the others.
"""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.fx.graph_module import _forward_from_src

from ...errors import GraphError
from ...store.closing import close
from ...store.modules import set_graph
from ...store.tensors import ADAPTERS, ROOT, get_tensor, owner_of
from ..core.base import Pass

PARTS = f"{ROOT}.parts"


@dataclass(frozen=True)
class Part:
    """A run of nodes that becomes one module. path: of the module that it was; "" for glue between blocks."""

    path: str
    nodes: tuple[fx.Node, ...]


class Block(nn.Module):
    """Base of the classes of blocks. `adapters`, not registered here: adapter name -> the store's module for this block."""


@dataclass(frozen=True)
class Outline(Pass):
    """Cuts a graph module that has module objects of its own (`store.derive`)."""

    def requires(self, gm):
        if block_classes(gm):
            raise GraphError("the graph is cut already; inline it first")

    def call(self, gm):
        ahead, body = split(gm.graph)
        parts = cut(gm, body, 0) if body else []
        build(gm, ahead, parts)
        return len(parts)


def block_classes(gm: fx.GraphModule) -> list[type[Block]]:
    """The classes of the blocks that `gm`'s graph calls, in order."""
    called = (gm.get_submodule(n.target) for n in gm.graph.nodes if n.op == "call_module")
    return list(dict.fromkeys(type(m) for m in called if isinstance(m, Block)))


def split(graph: fx.Graph) -> tuple[list[fx.Node], list[fx.Node]]:
    """The nodes that run ahead of all parts, and those to be cut. Parameters belong to neither."""
    ahead, body, early = [], [], set()
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            if node.op == "placeholder":
                early.add(node)
        elif node.op != "output":
            plain = not isinstance(node.meta.get("val"), torch.Tensor) and (node.users or node.op == "call_module")
            if plain and all(n in early for n in node.all_input_nodes):
                ahead.append(node)
                early.add(node)
            else:
                body.append(node)
    return ahead, body


# Cut


def list_paths(node: fx.Node) -> list[str]:
    """Paths of the list members that the node lies in, outermost first: `encoder.stages.1`, `encoder.stages.1.layers.0`."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = (entry[0] for entry in stack.values() if isinstance(entry, tuple))
    return [p for p in dict.fromkeys(paths) if p.rpartition(".")[2].isdigit()]


def cut(gm: fx.GraphModule, nodes: Sequence[fx.Node], level: int) -> list[Part]:
    """`nodes`, in order, as blocks of equal members and glue."""
    runs = runs_of(nodes, level)
    keys = {run.path: key_of(gm, run) for run in runs if run.path}
    count = Counter(keys.values())
    parts: list[Part] = []
    for run in runs:
        if not run.path or count[keys[run.path]] > 1:
            parts.append(run)
            continue
        inner = cut(gm, run.nodes, level + 1) if any(len(list_paths(n)) > level + 1 for n in run.nodes) else []
        repeated = Counter(key_of(gm, p) for p in inner if p.path)
        parts += inner if any(n > 1 for n in repeated.values()) else [run]
    return parts


def runs_of(nodes: Sequence[fx.Node], level: int) -> list[Part]:
    """Contiguous runs: from the first to the last node of a list member, and what lies between members."""
    paths = [(list_paths(n)[level : level + 1] or [""])[0] for n in nodes]
    spans: dict[str, tuple[int, int]] = {}
    for i, path in enumerate(paths):
        if path:
            spans[path] = (spans.get(path, (i, i))[0], i)
    runs: list[Part] = []
    at = 0
    for path, (first, last) in sorted(spans.items(), key=lambda item: item[1]):
        if first < at:  # entangled with the member before: part of it
            if runs and last >= at:
                runs[-1] = Part(runs[-1].path, (*runs[-1].nodes, *nodes[at : last + 1]))
                at = last + 1
            continue
        if first > at:
            runs.append(Part("", tuple(nodes[at:first])))
        runs.append(Part(path, tuple(nodes[first : last + 1])))
        at = last + 1
    return [*runs, Part("", tuple(nodes[at:]))] if at < len(nodes) else runs


# Equality


def key_of(gm: fx.GraphModule, part: Part) -> Hashable:
    """Equal for parts that compute the same of their arguments and tensors."""
    local: dict[fx.Node, str] = {}
    symbols: dict[str, str] = {}

    def named(node: fx.Node) -> str:
        if node not in local:
            owned = own_name(node, part)
            kind = f"own {owned}" if owned else "argument"
            local[node] = f"{kind} {len(local)} {value_key(gm, node, symbols)}"
        return local[node]

    lines = []
    for node in part.nodes:
        arguments = fx.map_arg((node.args, node.kwargs), named)
        lines.append((node.op, str(node.target), repr(arguments), value_key(gm, node, symbols)))
        local[node] = f"%{len(local)}"
    return tuple(lines), tuple(local[n] for n in outputs_of(part))


def value_key(gm: fx.GraphModule, node: fx.Node, symbols: dict[str, str]) -> str:
    """A node's metadata as text; symbols that are data-dependent are numbered as they occur."""
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        grad = value.requires_grad if node.op != "get_attr" else getattr(tensor_of(gm, node), "requires_grad", None)
        text = f"{tuple(value.shape)} {value.stride()} {value.dtype} {value.device} {grad}"
    elif node.op == "get_attr":
        module = getattr(gm, str(node.target), None)
        text = module.code if isinstance(module, fx.GraphModule) else repr(node.target)
    else:
        text = f"{type(value).__name__} {value}"
    return re.sub(r"\bu\d+\b", lambda m: symbols.setdefault(m[0], f"u_{len(symbols)}"), text)


def tensor_of(gm: fx.GraphModule, node: fx.Node):
    return get_tensor(gm, str(node.target))


def outputs_of(part: Part) -> list[fx.Node]:
    """Nodes whose values are read outside."""
    inside = set(part.nodes)
    return [n for n in part.nodes if any(user not in inside for user in n.users)]


def own_name(node: fx.Node, part: Part) -> str:
    """A tensor's name inside the block; "" for what is not the block's own: other parts read it too, or it lies elsewhere."""
    name, path = str(node.target), part.path
    if node.op != "get_attr" or not path or not set(node.users) <= set(part.nodes):
        return ""
    if name.startswith(f"{path}."):
        return name[len(path) + 1 :]
    if name.startswith(f"{ADAPTERS}."):
        adapter, _, rest = name[len(ADAPTERS) + 1 :].partition(".")
        if rest.startswith(f"{path}."):
            return f"adapters.{adapter}.{rest[len(path) + 1 :]}"
    return ""


# Build


def build(gm: fx.GraphModule, ahead: Sequence[fx.Node], parts: Sequence[Part]) -> None:
    """Replaces `gm`'s graph by one that calls a module for every part."""
    old, root = gm.graph, fx.Graph(tracer_cls=gm.graph._tracer_cls)
    env: dict[fx.Node, fx.Node] = {}

    def value(node: fx.Node) -> fx.Node:
        """A value from outside the parts, in the new graph: the module's tensors are read where they are first needed."""
        if node not in env:
            env[node] = root.node_copy(node, value)
        return env[node]

    for node in (*(n for n in old.nodes if n.op == "placeholder"), *ahead):
        value(node)
    classes: dict[Hashable, type[Block]] = {}
    for i, part in enumerate(parts):
        inputs, outputs = inputs_of(part), outputs_of(part)
        key = key_of(gm, part)
        if key not in classes:
            classes[key] = block_class(part, inputs, outputs)
        name = part.path or f"{PARTS}.{i}"
        place(gm, name, classes[key])
        call = root.call_module(name, tuple(value(n) for n in inputs))
        call.meta["val"] = tuple(n.meta.get("val") for n in outputs)
        for position, node in enumerate(outputs):
            env[node] = root.call_function(operator.getitem, (call, position))
            env[node].meta = dict(node.meta)
    output = old.output_node()
    root.output(fx.map_arg(output.args[0], value)).meta = dict(output.meta)
    root._codegen = old._codegen
    set_graph(gm, root)


def inputs_of(part: Part) -> list[fx.Node]:
    """Values from outside, in the order in which they are first read; not the block's own tensors."""
    inside = set(part.nodes)
    found = (n for node in part.nodes for n in node.all_input_nodes if n not in inside and not own_name(n, part))
    return list(dict.fromkeys(found))


def block_class(part: Part, inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> type[Block]:
    """A class whose forward runs the part: (*inputs) -> tuple of outputs, tensors read from `self`."""
    graph = fx.Graph()
    env = {node: graph.placeholder(node.name) for node in inputs}

    def value(node: fx.Node) -> fx.Node:
        if node not in env:
            env[node] = graph.get_attr(own_name(node, part))
        return env[node]

    for node in part.nodes:
        env[node] = graph.node_copy(node, value)
    graph.output(tuple(env[n] for n in outputs))
    close(graph)
    code = graph.python_code("self")
    return type("Block", (Block,), {"forward": _forward_from_src(code.src, code.globals)})


def place(gm: fx.GraphModule, name: str, cls: type[Block]) -> None:
    """Puts a block where the module `name` was: over the same tensors and modules."""
    owner, leaf = owner_of(gm, name, create=True)
    block = cls()
    if (old := owner._modules.get(leaf)) is not None:
        block.__dict__ = dict(old.__dict__)
    adapters = nn.Module()
    for adapter, module in gm.get_submodule(ADAPTERS).named_children():
        if (below := module_at(module, name)) is not None:
            adapters.add_module(adapter, below)
    block.__dict__["adapters"] = adapters  # the store registers them; here they would be in the state dict twice
    owner._modules[leaf] = block


def module_at(module: nn.Module, name: str) -> nn.Module | None:
    found: nn.Module | None = module
    for part in name.split("."):
        found = None if found is None else found._modules.get(part)
    return found
