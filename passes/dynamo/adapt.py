"""Dynamo's graphs, in the dialect of the other passes as far as these look, and back.

    L_self_modules_q_proj_parameters_weight_  ->  get_attr q_proj.weight       known by the tensor, not by Dynamo's name
    torch._C._nn.linear(x, W, b)              ->  aten.linear(x, W, b)         operators that read a target; others stay
    ... Inject ...
    get_attr q_proj.weight                    ->  the placeholder, detached if it requires grad: the base is frozen
    get_attr peft_fx.adapters...              ->  one more placeholder

Only readers of targets are traced to ATen, so that everything else is as Dynamo wrote it for the compiler behind us: autocast,
one fused call per torch function. Activation checkpoints are graphs of their own and are adapted inside.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx

from ...errors import GraphError
from ...planning.plan import Placement
from ...storage.packed import weight_name
from ...store.closing import close, packed_weights
from ...store.lazy import Forgetful, copy_graph
from ...store.modules import Store
from ...store.state import State, base_of
from ...store.tensors import ROOT, set_tensor, tensor_of
from ...target import ModuleTable
from ..capture.linearise import Linearise
from ..capture.literals import BakeLiterals
from ..core.base import Pass, run
from ..core.fakes import fake_mode_of, fake_of
from ..core.nodes import input_of, name_of
from ..core.regions import body_of
from ..core.splice import TAG, Splicer
from ..inject.inject import Inject
from ..match.operators import keeps_axes
from ..match.readers import packed_name, parameter_nodes, tensor_nodes

CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint
# position of an input -> the model's tensor, its names in the model
Inputs = Mapping[int, tuple[torch.Tensor, tuple[str, ...]]]
STATIC = {"_dynamo_static_input_type": "unguarded"}  # how Dynamo marks a module's parameters for CUDA graphs


def adapt(
    gm: fx.GraphModule, inputs: Inputs, placements: Sequence[Placement], state: State, store: Store
) -> tuple[fx.GraphModule, list[str]]:
    """A copy of Dynamo's graph module with the adapters in it, and the names of the tensors that it takes as further inputs."""
    new = Forgetful(gm, copy_graph(gm.graph))
    for node in new.graph.nodes:
        node.meta["val"] = node.meta.get("example_value")
    new.add_module(ROOT, store)
    new.meta[ROOT] = state
    run((NameInputs(inputs, state.table),), new)
    inside = adapt_checkpoints(new, inputs, placements, state, store)
    outside = tuple(p for p in placements if p not in inside)
    packed = map(packed_name, packed_weights(new.graph))  # closed with all their readers
    targets = frozenset([*packed, *(name for p in outside for name in (p.target.name, p.target.bias_name))])
    run((ReadersToAten(targets, base_of(state).traces), Linearise(), Inject(outside, state.gated), BakeLiterals()), new)
    graph, ours = with_inputs(new)
    close(graph)
    del new.meta[ROOT]
    return Forgetful(new, graph), ours


def adapt_checkpoints(gm: fx.GraphModule, inputs: Inputs, placements, state: State, store: Store) -> list[Placement]:
    """Adapts targets that one activation checkpoint alone reads, inside of it; returns their placements."""
    done = []
    for node in gm.graph.find_nodes(op="call_function", target=CHECKPOINT):
        body, operands = body_of(gm, node), node.args[1:]
        own = {n.target: i for i, n in enumerate(operands) if n.op == "get_attr" and set(n.users) == {node}}
        mine = [p for p in placements if p.target.name in own]
        if not mine:
            continue
        found = {i: (tensor_of(gm, name), (name,)) for name, i in own.items()}
        adapted, ours = adapt(body, found, mine, state, store)
        name = f"{name_of(input_of(node))}_adapted"
        gm.add_module(name, adapted)
        with gm.graph.inserting_before(node):
            tensors = [tensor_node(gm, name) for name in ours]
            node.args = (gm.graph.get_attr(name), *operands, *tensors)
        done += mine
    return done


def tensor_node(gm: fx.GraphModule, name: str) -> fx.Node:
    """The one node that reads a tensor of ours."""
    for node in gm.graph.find_nodes(op="get_attr"):
        if node.target == name:
            return node
    first = next(n for n in gm.graph.nodes if n.op not in ("placeholder", "get_attr"))
    with gm.graph.inserting_before(first):
        node = gm.graph.get_attr(name)
    node.meta["val"] = fake_of(fake_mode_of(gm), tensor_of(gm, name))
    return node


@dataclass(frozen=True)
class NameInputs(Pass):
    """Gives the model's tensors their names again."""

    inputs: Inputs
    table: ModuleTable

    def call(self, gm):
        placeholders = gm.graph.find_nodes(op="placeholder")
        start = next(n for n in gm.graph.nodes if n.op != "placeholder")
        for position, (tensor, names) in self.inputs.items():
            placeholder, found = placeholders[position], {}
            for reader in list(placeholder.users):
                name = names[0] if len(names) == 1 else self.name_for(reader, names)
                if name not in found:
                    set_tensor(gm, name, tensor)
                    with gm.graph.inserting_before(start):
                        found[name] = gm.graph.get_attr(name)
                    found[name].meta = {"val": placeholder.meta["val"], "placeholder": placeholder}
                reader.replace_input_with(placeholder, found[name])
        return len(self.inputs)

    def name_for(self, reader: fx.Node, names: Sequence[str]) -> str:
        """Of a tied tensor's names, that of the module that reads it.

        Dynamo's module paths begin at the frame that it traced, so that they are compared from their ends.
        """
        stack = list((reader.meta.get("nn_module_stack") or {}).values())
        innermost = stack[-1][0].split(".")[1:] if stack else []
        looks_up = reader.target is torch.nn.functional.embedding

        def fits(name: str) -> tuple[int, bool]:
            path = name.rpartition(".")[0]
            pairs = zip(reversed(path.split(".")), reversed(innermost), strict=False)
            same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(path.count(".") + 1, len(innermost)))
            return same, self.table[path].is_a("Embedding") == looks_up

        return max(names, key=fits)


@dataclass(frozen=True)
class ReadersToAten(Pass):
    """Traces the calls that read the named tensors, through views that keep their axes, to ATen operators."""

    names: frozenset[str]
    traces: dict

    def call(self, gm):
        splice = Splicer(gm, fake_mode_of(gm), self.traces)
        read = {n for name, n in parameter_nodes(gm.graph).items() if name in self.names}
        read |= {n for n in tensor_nodes(gm.graph).values() if weight_name(name_of(n)) in self.names}
        changed = 0
        for node in list(gm.graph.nodes):
            if read.isdisjoint(node.all_input_nodes) or not traceable(node):
                continue
            try:
                results = aten_of(splice, node)
            except GraphError:
                continue  # switches the grad mode, say: no form at the operator covers it
            read |= {n for n in results if n is not None and n.op == "call_function" and keeps_axes(n)}
            changed += 1
        for node in gm.graph.nodes:
            if TAG in node.meta.get("custom", {}):  # these are the model's own
                node.meta["custom"] = {k: v for k, v in node.meta["custom"].items() if k != TAG}
        return changed


def traceable(node: fx.Node) -> bool:
    """True for calls of torch functions and methods on tensors that give a tensor, or a tuple that is taken apart."""
    if node.op not in ("call_function", "call_method") or isinstance(node.target, torch._ops.OperatorBase):
        return False
    if not all(isinstance(n.meta.get("val"), torch.Tensor) for n in node.all_input_nodes):
        return False
    if isinstance(node.meta["val"], tuple):
        return all(u.target is operator.getitem and u.args[0] is node for u in node.users)
    return isinstance(node.meta["val"], torch.Tensor)


def aten_of(splice: Splicer, node: fx.Node) -> list[Any]:
    """Puts the ATen operators of a call in its place; returns its results."""
    inputs = node.all_input_nodes
    role = {n: f"%{i}" for i, n in enumerate(inputs)}

    def function(*tensors):
        env = dict(zip(inputs, tensors, strict=True))
        args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
        call = getattr(torch.Tensor, node.target) if isinstance(node.target, str) else node.target  # a method's name
        result = call(*args, **kwargs)
        return result if isinstance(result, tuple) else (result,)

    static = ("aten", node.op, node.target, str(fx.map_arg((node.args, node.kwargs), role.__getitem__)))
    results = splice(function, static, inputs, node, {})
    if isinstance(node.meta["val"], tuple):
        for user in list(node.users):
            user.replace_all_uses_with(results[cast(int, user.args[1])])
            splice.gm.graph.erase_node(user)
    else:
        node.replace_all_uses_with(results[0], propagate_meta=False)
    splice.gm.graph.erase_node(node)
    return results


def with_inputs(gm: fx.GraphModule) -> tuple[fx.Graph, list[str]]:
    """Dynamo's calling convention again: the graph with its placeholders, then one for each tensor of ours, and their names."""
    graph, ours = copy_graph(gm.graph), list[str]()
    last = max(n for n in graph.nodes if n.op == "placeholder")
    placeholders = {n.name: n for n in graph.nodes if n.op == "placeholder"}
    for old, new in zip(gm.graph.find_nodes(op="placeholder"), placeholders.values(), strict=True):
        new._dynamo_source = getattr(old, "_dynamo_source", None)
    for node in graph.find_nodes(op="get_attr"):
        if "placeholder" in node.meta:
            stands_for = placeholders[node.meta["placeholder"].name]
            if node.meta["val"].requires_grad:
                with graph.inserting_before(node):
                    stands_for = graph.call_function(torch.ops.aten.detach.default, (stands_for,))
        elif node.target.startswith(f"{ROOT}."):
            with graph.inserting_after(last):
                last = stands_for = graph.placeholder(f"peft_fx_{len(ours)}")
            stands_for.meta = {"example_value": node.meta["val"], "tensor_dict": dict(STATIC)}
            stands_for._dynamo_source = None
            ours.append(node.target)
        else:
            continue
        node.replace_all_uses_with(stands_for, propagate_meta=False)
        graph.erase_node(node)
    return graph, ours
