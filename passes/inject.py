"""Splice adapters into a base graph: decide first (one `Lowering` per placement), then insert.

Activation form where the method is additive and every reader of the target is a recognised operator; weight form at the
parameter otherwise. Adapters on one target compose in the order given: once a placement needs the weight form, those
before it take it too, so that the result equals merging them in that order.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from ..errors import RecipeError
from ..methods import get_method
from ..planning.plan import Placement, Refusal, Shared, clashes
from ..store import ADAPTERS, ROOT, get_tensor
from ..target import Target
from .base import Pass, regions
from .fakes import fake_mode_of, fake_of
from .lowering import activation_inputs, activation_signature, form_of, weight_function
from .match import Site, parameter_nodes, sites
from .operators import full_args
from .splice import TAG, Splicer

aten = torch.ops.aten


@dataclass(frozen=True)
class Lowering:
    """How one placement enters the graph. form: "activation", "weight", "none" (target not read), or "refused"."""

    placement: Placement
    form: str
    reason: str
    sites: tuple[Site, ...] = ()


def lower(graph: fx.Graph, placements: Sequence[Placement]) -> list[Lowering]:
    """Decides the form of every placement, in order; nothing is changed."""
    nodes = {name: node for name, node in parameter_nodes(graph).items() if node.users}
    found = {p.target.name: readable(nodes[p.target.name], p.target) for p in placements if p.target.name in nodes}
    reasons = [weight_reason(i, placements, found) for i in range(len(placements))]
    last_weight = {p.target.name: i for i, p in enumerate(placements) if reasons[i]}
    return [
        lowering(p, found.get(p.target.name), reasons[i] or composed(i, last_weight.get(p.target.name, -1)))
        for i, p in enumerate(placements)
    ]


def weight_reason(i: int, placements: Sequence[Placement], found: dict) -> str:
    """Why a placement by itself needs the weight form; "" if it does not."""
    p = placements[i]
    form, (at, reason) = form_of(get_method(p.method)), found.get(p.target.name, ([], ""))
    if form is None:
        return "the method rewrites the weight"
    if reason:
        return reason
    if form.kinds is not None and (other := {s.operator.kind for s in at} - form.kinds):
        return f"the method has no other form on {', '.join(sorted(other))}"
    if form.place == "input" and any(q.target.name == p.target.name for q in placements[:i]):
        return "a map of the input has to come first"
    if get_method(p.method).reads_weight and any(q.target.name == p.target.name for q in placements[:i]):
        return "an update that reads the weight has to come first"
    return ""


def composed(i: int, last_weight: int) -> str:
    return "composed with an adapter that needs the weight form" if i <= last_weight else ""


def readable(node: fx.Node, target: Target) -> tuple[list[Site], str]:
    """The sites of a target, and "" or why the activation form cannot be used at them."""
    found, reason = sites(node)
    if not reason and any(s.stored_transposed != target.transposed for s in found):
        reason = "the operator reads the weight in another orientation than PEFT files it"
    return found, reason


def lowering(p: Placement, found: tuple[list[Site], str] | None, reason: str) -> Lowering:
    """reason: why the weight form is needed, or ""."""
    if found is None:
        return Lowering(p, "none", "the graph does not read this parameter")
    if not reason:
        return Lowering(p, "activation", "", tuple(found[0]))
    if lost := get_method(p.method).activation_only(p.target, p.config):
        return Lowering(p, "refused", f"{lost} needs the activation form, but {reason}")
    return Lowering(p, "weight", reason, tuple(found[0]))


@dataclass(frozen=True)
class Inject(Pass):
    placements: tuple[Placement, ...]

    def call(self, gm):
        decided = lower(gm.graph, self.placements)
        refused = [Refusal(x.placement.target.name, f"refused: {x.reason}") for x in decided if x.form == "refused"]
        if refused := [*refused, *clashes(self.placements)]:
            raise RecipeError("\n".join(map(str, refused)))
        insert = Insert(gm)
        for x in decided:
            if x.form != "none":
                getattr(insert, x.form)(x)
        return len(decided)


class Insert:
    """The two ways of inserting, over one graph module."""

    def __init__(self, gm: fx.GraphModule):
        self.gm, self.graph = gm, gm.graph
        self.nodes = parameter_nodes(gm.graph)
        self.fake_mode = fake_mode_of(gm)
        self.splice = Splicer(gm, self.fake_mode, gm.meta[ROOT].base.traces)
        self.config_keys: dict[int, str] = {}  # id of a config -> its text: the same for equal configs of other runs
        self.inputs: dict[fx.Node, fx.Node] = {}  # operator node -> the input that it has in the base graph
        self.heads: dict[fx.Node, fx.Node] = {}  # operator node or parameter node -> its latest adapted value
        self.splices = itertools.count()

    def activation(self, x: Lowering) -> None:
        p, method = x.placement, get_method(x.placement.method)
        theta, names = self.theta(p)
        form = form_of(method)
        for site in x.sites:
            # the operator reads what weight forms before this one made of the parameter
            site = replace(site, parameter=self.heads.get(site.parameter, site.parameter))
            function = form.build(site, method, p.target, p.config, names)
            static = ("activation", type(method), self.key(p), bare(p), activation_signature(site))
            label = tag(p, next(self.splices))
            original = self.inputs.setdefault(site.node, site.x)
            if form.place == "input":
                (mapped,) = self.splice(function, static, [original, *theta], site.node, label, after=False)
                self.mark(original, mapped, label)
                site.node.replace_input_with(original, mapped)
                continue
            y = self.heads.get(site.node, site.node)
            inputs = activation_inputs(site) if form.inputs else []
            if method.reads_weight:
                inputs = [*inputs, self.nodes[p.target.name]]
            (result,) = self.splice(function, static, [y, original, *theta, *inputs], y, label)
            self.replace(y, result, label)
            self.heads[site.node] = result

    def weight(self, x: Lowering) -> None:
        p, method = x.placement, get_method(x.placement.method)
        theta, names = self.theta(p)
        W = self.nodes[p.target.name]
        b = self.nodes.get(p.target.bias_name)  # of the base, or one that an adapter before this one added
        old_W, old_b = self.heads.get(W, W), b if b is None else self.heads.get(b, b)
        function = weight_function(method, p.target, p.config, names)
        static = ("weight", type(method), self.key(p), bare(p))
        first = min(old_W.users) if old_b is None else min([*old_W.users, *old_b.users])
        label = tag(p, next(self.splices))
        new_W, new_b = self.splice(function, static, [old_W, old_b, *theta], first, label, after=False)
        self.replace(old_W, new_W, label)
        self.heads[W] = new_W
        if new_b is not None and new_b is not old_b:
            if old_b is None:
                add_bias(x.sites, new_b)
                self.nodes[p.target.bias_name] = new_b
            else:
                self.replace(old_b, new_b, {**label, "target": p.target.bias_name})
                self.heads[b] = new_b
        if method.dense_groups(p.target):
            drop_groups(x.sites)

    def key(self, p: Placement) -> str:
        if id(p.config) not in self.config_keys:
            self.config_keys[id(p.config)] = repr(p.config)
        return self.config_keys[id(p.config)]

    def theta(self, p: Placement) -> tuple[list[fx.Node], tuple[str, ...]]:
        """Nodes for the placement's tensors, ahead of the first operation, so that any site can use them."""
        return [self.tensor(p.resolve(name)) for name in p.tensors], tuple(p.tensors)

    def tensor(self, shared: Shared) -> fx.Node:
        name = f"{ADAPTERS}.{shared.name}"
        if name not in self.nodes:
            with self.graph.inserting_before(self.first_call):
                node = self.nodes[name] = self.graph.get_attr(name)
            node.meta["val"] = fake_of(self.fake_mode, get_tensor(self.gm, name))
        node = self.nodes[name]
        if not shared.transposed:
            return node
        if (name, "t") not in self.nodes:
            with self.graph.inserting_before(self.first_call):
                view = self.nodes[name, "t"] = self.graph.call_function(aten.t.default, (node,))
            view.meta = {"val": node.meta["val"].t(), "custom": {TAG: {"target": shared.name, "role": "body"}}}
        return self.nodes[name, "t"]

    @property
    def first_call(self) -> fx.Node:
        return next(n for n in self.graph.nodes if n.op not in ("placeholder", "get_attr"))

    def replace(self, old: fx.Node, new: fx.Node, label: dict) -> None:
        """Points every reader of `old` at `new`, but for the nodes of this splice; tags both ends, so that it can be undone."""
        old.replace_all_uses_with(
            new, delete_user_cb=lambda user: tag_of(user).get("splice") != label["splice"], propagate_meta=False
        )
        self.mark(old, new, label)

    def mark(self, old: fx.Node, new: fx.Node, label: dict) -> None:
        new.meta["custom"][TAG] = {**label, "role": "result"}
        add_tag(old, base_of=[*tag_of(old).get("base_of", ()), [label["splice"], label["target"]]])


def tag(p: Placement, splice: int) -> dict:
    """What every inserted node says of itself: which splice it belongs to, and for whom."""
    return {"splice": splice, "adapter": p.adapter, "target": p.target.name, "method": p.method}


def tag_of(node: fx.Node) -> dict:
    """Our tag on a node; {} on the model's own nodes."""
    return node.meta.get("custom", {}).get(TAG, {})


def add_tag(node: fx.Node, **entries) -> None:
    """Adds entries to a node's tag, in dicts of the node's own."""
    node.meta["custom"] = {**node.meta.get("custom", {}), TAG: {**tag_of(node), **entries}}


def bare(p: Placement) -> tuple:
    """What of a target a traced function depends on."""
    t = p.target
    return t.kind, t.shape, t.transposed, t.groups


def add_bias(sites: Sequence[Site], bias: fx.Node) -> None:
    """Gives operators that had no bias the one a method adds."""
    for site in sites:
        set_argument(site.node, site.operator.bias, bias)


def drop_groups(sites: Sequence[Site]) -> None:
    """Makes grouped convolutions ungrouped: their weight now holds every channel."""
    for site in sites:
        set_argument(site.node, site.operator.groups, 1)


def set_argument(node: fx.Node, position: int, value) -> None:
    """Changes an argument of a base operator; its tag remembers the literal that was there."""
    args = full_args(node)
    add_tag(node, was={**tag_of(node).get("was", {}), str(position): args[position]})
    args[position] = value
    node.args = tuple(args)


def tagged(gm: fx.GraphModule) -> list[fx.Node]:
    """All nodes that passes of ours inserted, regions included."""
    own = [n for n in gm.graph.nodes if tag_of(n).get("role")]
    return own + [n for region in regions(gm) for n in tagged(region)]
