"""Give every (module path, parameter) its own get_attr name.

Export reads a tied or shared tensor under the last of its names. After this pass a get_attr is called by the path of the
module that reads it: `embed_tokens.weight` at the embedding and `lm_head.weight` at the head, still one tensor; a module
that is reachable under two paths reads under its first. Also puts `val` on get_attr nodes and merges repeated ones.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from ...errors import GraphError
from ...store.tensors import get_tensor, set_tensor
from ...target import ModuleTable
from ..core.base import Pass
from ..core.fakes import fake_mode_of, fake_of


@dataclass(frozen=True)
class NameParameters(Pass):
    table: ModuleTable

    def call(self, gm):
        fake_mode = fake_mode_of(gm)
        names = self.names(gm)
        first: dict[str, fx.Node] = {}
        changed = 0
        start = next(n for n in gm.graph.nodes if n.op == "placeholder" or n.op == "output")
        for node in [n for n in gm.graph.nodes if n.op == "get_attr"]:
            tensor = get_tensor(gm, node.target)
            if tensor is None:
                continue  # a region's sub-graph
            for reader in list(node.users):
                name = self.own_name(names.get(node.target, (node.target,)), reader)
                if name not in first:
                    if get_tensor(gm, name) is not tensor:
                        set_tensor(gm, name, tensor)
                    with gm.graph.inserting_before(start):
                        first[name] = gm.graph.get_attr(name)
                    first[name].meta["val"] = fake_of(fake_mode, tensor)
                changed += name != node.target
                reader.replace_input_with(node, first[name])
            gm.graph.erase_node(node)
        return changed

    def names(self, gm) -> dict[str, tuple[str, ...]]:
        """Any name of a tensor -> the names of all distinct modules' parameters that are this tensor."""
        aliases = {}
        for record in self.table.records:
            for parameter in [*record.parameters, *record.buffers]:
                own = f"{record.path}.{parameter}" if record.path else parameter
                group = (own, *self.table.tied_to(own))
                for path in (record.path, *record.aliases):
                    aliases[f"{path}.{parameter}" if path else parameter] = group
        return aliases

    def own_name(self, group: tuple[str, ...], reader: fx.Node) -> str:
        """The name in `group` whose module is innermost on the reader's module stack; else the first."""
        if len(group) == 1:
            return group[0]
        stack = [path for path, _ in reader.meta.get("nn_module_stack", {}).values()]
        for path in reversed(stack):
            record = self.table.by_path.get(path.split("@")[0])
            for name in group:
                if record is not None and name.rpartition(".")[0] == record.path:
                    return name
        return group[0]

    def ensures(self, gm):
        targets = [n.target for n in gm.graph.nodes if n.op == "get_attr"]
        if len(targets) != len(set(targets)):
            raise GraphError("a parameter is read through more than one get_attr node")
