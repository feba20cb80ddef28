"""Take every splice out of an adapted graph again, by its tags: how a graph that was loaded from a file gets its base.

Within a process the base graph is kept and nothing is stripped; a file holds the adapted program only.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from ...errors import GraphError
from ..core.base import Pass
from ..core.splice import TAG
from ..match.readers import add_reader, parameter_nodes
from .inject import tag_of, tagged


@dataclass(frozen=True)
class StripSplices(Pass):
    def call(self, gm):
        graph = gm.graph
        # placeholders of a loaded program have lost their tags: what is not in `bases` replaced the parameter itself
        bases = {tuple(splice): n for n in graph.nodes for splice in tag_of(n).get("base_of", ())}
        parameters = parameter_nodes(graph)
        results = [n for n in graph.nodes if tag_of(n).get("role") == "result"]
        for node in reversed(results):
            tag = tag_of(node)
            base = bases.get((tag["splice"], tag["target"])) or parameter(gm, parameters, tag["target"])
            node.replace_all_uses_with(base, propagate_meta=False)
        for node in graph.nodes:
            restore_arguments(node)
        for node in reversed(graph.nodes):
            if not node.users and (
                tag_of(node).get("role") or (node.op == "get_attr" and node.target.startswith("peft_fx."))
            ):
                graph.erase_node(node)
        for node in graph.nodes:
            if TAG in node.meta.get("custom", {}):
                node.meta["custom"] = {k: v for k, v in node.meta["custom"].items() if k != TAG}
        return len(results)

    def ensures(self, gm):
        if left := tagged(gm):
            raise GraphError(f"{len(left)} nodes of adapters are left in the base graph, first {left[0].name}")


def parameter(gm: fx.GraphModule, known: dict[str, fx.Node], name: str) -> fx.Node:
    """The node of a base parameter; a new one where a substitution had left it without readers."""
    if name not in known:
        first = next(n for n in gm.graph.nodes if n.op != "placeholder")
        with gm.graph.inserting_before(first):
            known[name] = add_reader(gm, name)
    return known[name]


def restore_arguments(node: fx.Node) -> None:
    """Puts back the literals that a splice changed on a base operator."""
    for position, literal in tag_of(node).get("was", {}).items():
        args = list(node.args)
        args[int(position)] = literal
        node.args = tuple(args)
