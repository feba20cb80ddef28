"""What a captured graph says of itself when it is printed: a few lines, from what it carries; nothing is computed. And what
is said of that which was given in place of one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from os import PathLike

import torch
from torch import fx, nn

from ..tables import Table, as_html, counted, terminal_width, text
from ..target import sizes
from .lazy import graph_to_read
from .tensors import store_of

OURS = "peft_fx"  # the submodule, and the key of what is known of a graph and of a node
INDENT = "  "
MORE = (("every target", "peft_fx.explain(graph)"), ("the whole code", "graph.code, graph.print_readable()"))


def summary(graph: fx.GraphModule) -> str:
    """A title and lines of facts below it, as a module prints its parts."""
    lines = text([facts(graph)], terminal_width() - len(INDENT)).splitlines()
    return "\n".join([title(graph), *(INDENT + line for line in lines)])


def summary_html(graph: fx.GraphModule) -> str:
    return as_html([title(graph), facts(graph)])


def title(graph: fx.GraphModule) -> str:
    return f"GraphModule of {graph.meta[OURS].table.model_class or 'a model'}"


def facts(graph: fx.GraphModule) -> Table:
    rows = [("parameters", parameters(graph)), *adapters(graph), ("mode", mode(graph)), *inputs(graph), *MORE]
    return Table((), rows)


def parameters(graph: fx.GraphModule) -> str:
    found = list(graph.parameters())
    total, trained = sum(p.numel() for p in found), sum(p.numel() for p in found if p.requires_grad)
    kinds = Counter(f"{str(p.dtype).removeprefix('torch.')} on {p.device}" for p in found)
    share = f" ({100 * trained / total:.2f} %)" if total else ""
    return f"{total:,}, of which {trained:,} are trained{share}; {', '.join(kind for kind, _ in kinds.most_common(3))}"


def adapters(graph: fx.GraphModule) -> Iterator[tuple[str, str]]:
    """A line for each resident adapter, and one for free slots."""
    state = graph.meta[OURS]
    forms = forms_of(graph)
    for name, slot in state.residents.items():
        config = state.recipe[slot].config
        held = getattr(store_of(graph).adapters, slot, nn.Module())
        targets = {n.rpartition(".")[0] for kind in (held.named_parameters(), held.named_buffers()) for n, _ in kind}
        rank = f" {config.ranked}={getattr(config, config.ranked)}" if config.ranked else ""
        words = [config.peft_type + rank, counted(len(targets), "target"), *forms.get(slot, ()), status(graph, slot)]
        yield f"adapter {name}", ", ".join(words)
    if state.mixed:
        yield "rows", "each has an adapter of its own, by adapter_ids"
    if free := len(state.recipe) - len(state.residents):
        yield "free slots", f"{free}: hotswap(graph, path, 'name') fills one"


def forms_of(graph: fx.GraphModule) -> dict[str, list[str]]:
    """Adapter -> in which forms it is in the graph, and on how many targets each."""
    placed: dict[tuple[str, str], str] = {}
    for node in graph_to_read(graph).nodes:
        tag = node.meta.get("custom", {}).get(OURS, {})
        if tag.get("role") and "form" in tag:
            placed |= {(adapter, tag["target"]): tag["form"] for adapter in tag["adapter"].split(", ")}
    count = Counter((adapter, form) for (adapter, _), form in placed.items())
    several = {adapter for adapter, n in Counter(adapter for adapter, _ in count).items() if n > 1}
    result: dict[str, list[str]] = {}
    for (adapter, form), n in count.items():
        result.setdefault(adapter, []).append(f"{form} form" + (f" on {n:,}" if adapter in several else ""))
    return result


def status(graph: fx.GraphModule, adapter: str) -> str:
    state = graph.meta[OURS]
    if adapter in state.merged:
        return "merged into the weights"
    if not state.gated:
        return "active" if adapter in state.acting else "not active"
    gate = getattr(getattr(store_of(graph).gates, adapter, None), "open", None)
    if gate is None or gate.is_meta:
        return "in a slot"
    return f"on with weight {gate.item():g}" if gate.item() else "off"


def mode(graph: fx.GraphModule) -> str:
    switch = store_of(graph).mode
    now = "train" if switch.training else "eval"
    return f"{now} only: {switch.locked}" if switch.locked else f"{now}; train() and eval() change it"


def inputs(graph: fx.GraphModule) -> Iterator[tuple[str, str]]:
    """Inputs with dtype and sizes, names for those that may vary."""
    nodes = graph_to_read(graph).nodes
    for n in (n for n in nodes if n.op == "placeholder"):
        value = n.meta.get("val")
        if isinstance(value, torch.Tensor):
            dtype = str(value.dtype).removeprefix("torch.")
            yield f"input {n.target}", f"{dtype} {sizes(value.shape)}"
        else:
            yield f"input {n.target}", "" if value is None else repr(value)
    if ranges := graph.meta[OURS].range_constraints:
        yield "sizes", ", ".join(bounds(ranges.items()))


def bounds(ranges: Iterable[tuple]) -> Iterator[str]:
    for name, found in ranges:
        least, most = (int(b) if b.is_Integer else None for b in (found.lower, found.upper))
        yield f"{name} {'any' if least is None else f'from {least}'}" + ("" if most is None else f" to {most:,}")


def told(given) -> str:
    """What was given in place of a captured graph, and how one is made of it."""
    name = type(given).__name__
    if isinstance(given, type):
        return f"the class {given.__name__}: make an instance, and capture it"
    if isinstance(given, (str, PathLike)):
        return f"{name}: peft_fx.load(path) reads one from a .pt2"
    if isinstance(given, fx.GraphModule):
        return f"{name}; a pass that rebuilt it dropped gm.meta: copy the meta over"
    if not isinstance(given, nn.Module):
        return name
    ways = {"_orig_mod": "give the graph that was compiled, ._orig_mod", "to_graph": "its to_graph() makes one"}
    return f"{name}: {next((ways[a] for a in ways if hasattr(given, a)), 'peft_fx.capture(model) makes one')}"
