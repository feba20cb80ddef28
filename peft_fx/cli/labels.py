"""Short names for the nodes of a view: a parameter goes by the end of its path that no other parameter shares."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from .nodes import Node


def labels_of(nodes: Sequence[Node]) -> dict[str, str]:
    """Node name -> label: `q_proj_weight`, `lora_A`; other nodes keep their name."""
    paths = {n.name: n.target.split(".") for n in nodes if n.op == "get_attr"}
    labels = {n.name: n.name for n in nodes}
    taken = {n.name for n in nodes if n.op != "get_attr"} | {i for n in nodes for i in n.inputs if i not in labels}
    left, depth = dict(paths), 1
    while left:
        ends = {name: "_".join(path[-depth:]) for name, path in left.items()}
        count = Counter(ends.values())
        for name, end in ends.items():
            whole = depth >= len(left[name])
            if whole or (end.isidentifier() and count[end] == 1 and end not in taken and end not in ("weight", "bias")):
                labels[name] = name if whole else end
                taken.add(labels[name])
        left = {name: path for name, path in left.items() if labels[name] == name and depth < len(path)}
        depth += 1
    return labels
