"""layer_replication: a deeper model out of a shallower one's layers, base weights shared (mergekit; PEFT's option).

    layers' = layers[a_1:b_1] + layers[a_2:b_2] + ...        ranges [[a_1, b_1], [a_2, b_2], ...]

A layer is a function hidden -> hidden of the graph, the nodes whose module stack lies in it; everything else (embedding,
masks, rotary tables, shapes) is glue that all layers read. Copies are renamed to their new index, so each is a layer of its
own, with adapters of its own, over tied base weights.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch
from torch import fx

from ...errors import RecipeError
from ...store.tensors import tensor_of
from ...target import ModuleRecord, ModuleTable
from ..core.base import Pass
from ..core.fakes import fake_mode_of, fake_of
from ..core.nodes import name_of

# Where model classes keep their list of layers: below any number of `model.`, and `bert.`.
LAYER_LISTS = re.compile(r"(?:(?:model|bert|transformer|roberta)\.)*(?:layers|encoder\.layer|h)$")


def layer_list(table: ModuleTable) -> str:
    """The path of the model's list of layers. Raises RecipeError if there is none, or more than one."""
    found = [r.path for r in table.records if r.is_a("ModuleList") and LAYER_LISTS.match(r.path)]
    if len(found) != 1:
        raise RecipeError(
            f"layer_replication: expected one list of layers (layers, encoder.layer or h), found {found or 'none'}"
        )
    return found[0]


def sources(ranges, count: int) -> list[int]:
    """New layer index -> old one. Raises RecipeError for ranges outside the model."""
    for pair in ranges:
        if len(pair) != 2 or not 0 <= pair[0] < pair[1] <= count:
            raise RecipeError(f"layer_replication: range {list(pair)} is not within the model's {count} layers")
    return [i for start, end in ranges for i in range(start, end)]


@dataclass(frozen=True)
class ReplicateLayers(Pass):
    """path: of the list of layers. order: new index -> old index. The module already holds the layers in the new order."""

    path: str
    order: tuple[int, ...]

    def call(self, gm):
        old = gm.graph
        layers = Layers(old, self.path, 1 + max(self.order))
        new = fx.Graph()
        new._codegen = old._codegen
        env: dict[fx.Node, fx.Node] = {}
        for node in old.nodes:
            if node.op == "placeholder" or (node.op == "get_attr" and not self.index(node.target)):
                env[node] = new.node_copy(node)
        later = layers.depends_on_layers()
        for node in old.nodes:
            if (
                node.op == "output"
                or node in env
                or (node in later and (shape_only(node) or self.done(layers, env, node)))
            ):
                continue
            if node in layers.member:
                self.emit_all(gm, new, layers, env, later)
            elif node.op != "get_attr":
                self.rest(new, layers, env, node)
        new.output(fx.map_arg(old.output_node().args[0], env.__getitem__)).meta = dict(old.output_node().meta)
        gm._graph = new
        new.owning_module = gm
        return len(self.order)

    def done(self, layers: Layers, env, node: fx.Node) -> bool:
        """Whether a layer's node comes after the layers have been copied."""
        return node in layers.member and layers.exit(layers.count - 1) in env

    def emit_all(self, gm, new: fx.Graph, layers: Layers, env, later) -> None:
        """Copies the layers one after the other, where the first one's first node stands."""
        for node in layers.member:
            for needed in node.all_input_nodes:
                if needed not in later and needed.op != "get_attr":
                    self.rest(new, layers, env, needed)
        hidden = env[layers.entry(0)]
        for index, source in enumerate(self.order):
            hidden = self.emit(gm, new, layers, env, index, source, hidden)
        env[layers.exit(layers.count - 1)] = hidden

    def rest(self, new: fx.Graph, layers: Layers, env, node: fx.Node) -> fx.Node:
        """Copies a node that comes after the layers, with the sizes it needs."""
        if node not in env:
            if node in layers.member:
                raise RecipeError(
                    f"layer_replication: {node.name} is used outside layer {layers.member[node]}, besides its output"
                )
            env[node] = new.node_copy(node, lambda n: self.rest(new, layers, env, n))
        return env[node]

    def emit(self, gm, new: fx.Graph, layers: Layers, env, index: int, source: int, hidden: fx.Node) -> fx.Node:
        """Copies one layer with `hidden` as its input; returns its output."""
        local = {layers.entry(source): hidden}

        def value(node: fx.Node) -> fx.Node:
            if node in local:
                return local[node]
            if node in env:
                return env[node]
            local[node] = self.copy(gm, new, node, source, index, value)
            return local[node]

        for node in layers.nodes[source]:
            if node not in local:
                local[node] = self.copy(gm, new, node, source, index, value)
        return local[layers.exit(source)]

    def copy(self, gm, new: fx.Graph, node: fx.Node, source: int, index: int, value) -> fx.Node:
        old_path, new_path = f"{self.path}.{source}", f"{self.path}.{index}"
        if node.op == "get_attr":
            copied = new.get_attr(renamed(name_of(node), old_path, new_path))
            tensor = tensor_of(gm, name_of(copied))
            copied.meta = {**node.meta, "val": fake_of(fake_mode_of(gm), tensor)}
            return copied
        copied = new.node_copy(node, value)
        stack = node.meta.get("nn_module_stack")
        if stack:
            copied.meta["nn_module_stack"] = {
                f"{key}@{index}": (renamed(path, old_path, new_path), kind) for key, (path, kind) in stack.items()
            }
        return copied

    def index(self, name: str) -> bool:
        return name.startswith(f"{self.path}.")


class Layers:
    """Which nodes make up which layer, and the one value that passes from each to the next."""

    def __init__(self, graph: fx.Graph, path: str, at_least: int):
        self.graph, self.path = graph, path
        self.member: dict[fx.Node, int] = {}
        self.nodes: dict[int, list[fx.Node]] = {}
        for node in graph.nodes:
            index = self.layer_of(node)
            if index is not None and not shape_only(node):
                self.member[node] = index
                self.nodes.setdefault(index, []).append(node)
        self.count = len(self.nodes)
        if self.count < at_least or sorted(self.nodes) != list(range(self.count)):
            raise RecipeError(
                f"layer_replication: the graph runs layers {sorted(self.nodes)} of {path}, once each is needed"
            )

    def layer_of(self, node: fx.Node) -> int | None:
        prefix = f"{self.path}."
        for path, _ in node.meta.get("nn_module_stack", {}).values():
            if path.startswith(prefix) and path[len(prefix) :].split(".")[0].isdigit():
                return int(path[len(prefix) :].split(".")[0])
        return None

    def exit(self, index: int) -> fx.Node:
        """The value that later nodes take from a layer."""
        outputs = [
            n for n in self.nodes[index] if any(self.member.get(u) != index and not shape_only(u) for u in n.users)
        ]
        if len(outputs) != 1:
            raise RecipeError(
                f"layer_replication: layer {index} hands {len(outputs)} values on, expected the hidden state alone"
            )
        return outputs[0]

    def entry(self, index: int) -> fx.Node:
        """The hidden state that a layer takes; for the first one, what stands where the second takes the first's."""
        if index:
            return self.exit(index - 1)
        if self.count < 2:
            raise RecipeError("layer_replication: a model of one layer gives nothing to compare its input with")
        handed = self.exit(0)
        for position, node in enumerate(self.nodes[1]):
            inputs = node.all_input_nodes
            if handed in inputs:
                first = self.nodes[0][position] if position < len(self.nodes[0]) else None
                if first is None or first.target != node.target:
                    raise RecipeError("layer_replication: the first two layers differ in structure")
                return first.all_input_nodes[inputs.index(handed)]
        raise RecipeError("layer_replication: the second layer does not read the first one's output")

    def depends_on_layers(self) -> set[fx.Node]:
        """All nodes that cannot be computed before the first layer."""
        later: set[fx.Node] = set()
        for node in self.graph.nodes:
            if node in self.member or any(n in later for n in node.all_input_nodes):
                later.add(node)
        return later


def shape_only(node: fx.Node) -> bool:
    """Sizes hold for every layer alike and belong to none."""
    return isinstance(node.meta.get("val"), (int, float, torch.SymInt, torch.SymFloat, torch.SymBool))


def renamed(name: str, old: str, new: str) -> str:
    return new + name[len(old) :] if name == old or name.startswith(f"{old}.") else name


def replicated_table(table: ModuleTable, path: str, order: tuple[int, ...]) -> ModuleTable:
    """The module table of the deeper model; copies of one layer are tied to one another."""
    records: list[ModuleRecord] = []
    for record in table.records:
        if not record.path.startswith(f"{path}."):
            records.append(record)
        if record.path == path:
            for index, source in enumerate(order):
                old = f"{path}.{source}"
                records += [
                    replace(r, path=renamed(r.path, old, f"{path}.{index}"),
                            aliases=tuple(renamed(a, old, f"{path}.{index}") for a in r.aliases))
                    for r in table.records if r.path == old or r.path.startswith(f"{old}.")
                ]  # fmt: skip
    tied = [group for group in table.tied if not any(n.startswith(f"{path}.") for n in group)]
    for source in dict.fromkeys(order):
        copies = [f"{path}.{i}" for i, s in enumerate(order) if s == source]
        if len(copies) > 1:
            old = f"{path}.{source}"
            for r in table.records:
                if r.path == old or r.path.startswith(f"{old}."):
                    tied += [tuple(f"{renamed(r.path, old, c)}.{p}" for c in copies) for p in r.parameters]
    return replace(table, records=tuple(records), tied=tuple(tied))
