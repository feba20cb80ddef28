"""Splice adapters into a base graph: decide first (one `Lowering` per placement), then insert.

Activation form where the method has one and every reader of the target is a recognised operator, unless the weight form
is counted to be much cheaper; weight form at the parameter otherwise. Adapters on one target compose in the order given:
once a placement needs the weight form, those before it take it too, so that the result equals merging them in that order.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import fx

from peft_fx.store.tensors import gate_name

from ...errors import RecipeError
from ...methods import get_method
from ...methods.base import HALF
from ...planning.kinds import one_line_each, stored_shape
from ...planning.plan import Placement, Refusal, Shared, clashes
from ...store.tensors import ADAPTERS, ROOT, packed_of, tensor_of
from ...target import Target
from ..core.base import Pass, regions
from ..core.fakes import fake_mode_of, fake_of
from ..core.splice import TAG, Splicer, signature
from ..forms.cost import cost
from ..forms.lowering import (
    REPLAY,
    Form,
    activation_inputs,
    activation_signature,
    bias_of,
    forms_of,
    gated,
    replayed,
    requantized_function,
    weight_function,
)
from ..match.operators import full_args
from ..match.readers import Site, parameter_nodes, sites

aten = torch.ops.aten

CHEAPER = 0.8  # the weight form is chosen below this share of the activation form's cost


@dataclass(frozen=True)
class Lowering:
    """How one placement enters the graph.

    form: "activation", "weight", "replay" (the operator runs once more, on the dropped input), "none" (target not read),
    or "refused". reason: why not the activation form.
    """

    placement: Placement
    form: str
    reason: str
    sites: tuple[Site, ...] = ()


def lower(graph: fx.Graph, placements: Sequence[Placement], known: dict) -> list[Lowering]:
    """Decides the form of every placement, in order; nothing is changed. known: costs counted before, by signature."""
    nodes = {name: node for name, node in parameter_nodes(graph).items() if node.users}
    found = {p.target.name: readable(nodes[p.target.name], p.target) for p in placements if p.target.name in nodes}
    together = Counter(p.target.name for p in placements)
    seen, reasons = set(), []
    for p in placements:
        reasons.append(weight_reason(p, found, p.target.name not in seen))
        seen.add(p.target.name)
    keys = ConfigKeys()
    for i, p in enumerate(placements):
        alone = together[p.target.name] == 1
        if p.target.name in found and not reasons[i] and (alone or p.lowering == "weight"):
            reasons[i] = chosen_weight(p, found[p.target.name][0], known, keys)
    last_weight = {p.target.name: i for i, p in enumerate(placements) if reasons[i]}
    return [
        lowering(p, found.get(p.target.name), reasons[i], composed(i, last_weight.get(p.target.name, -1)))
        for i, p in enumerate(placements)
    ]


def weight_reason(p: Placement, found: dict, first: bool) -> str:
    """Why a placement by itself cannot have the activation form; "" if it can. first: of those on its target."""
    forms, (at, reason) = forms_of(p.rule), found.get(p.target.name, ([], ""))
    if not forms:
        return "the method rewrites the weight"
    if reason:
        return reason
    for form in forms:
        if form.kinds is not None and (other := {s.operator.kind for s in at} - form.kinds):
            return f"{p.method} only has the weight form on {', '.join(sorted(other))}"
    if not first:
        if any(form.place == "input" for form in forms):
            return f"{p.method} changes the operator's input, which only the first adapter on a target can"
        if p.rule.reads:
            return f"{p.method}'s update reads the weight, which only the first adapter on a target can"
    return ""


def chosen_weight(p: Placement, at: Sequence[Site], known: dict, keys: ConfigKeys) -> str:
    """Why the weight form is taken though there is the other one: it was asked for, or costs less. "" if it is not."""
    if p.lowering == "weight":
        return "lowering='weight' was asked for"
    if p.lowering == "activation" or not at or p.target.reads_ids:  # a lookup reads few rows of the table
        return ""
    if p.rule.activation_only(p.target, p.config) or p.rule.input_dropout(p.target, p.config):
        return ""
    if p.rule.rounds_weight and at[0].parameter.meta["val"].dtype in HALF:
        return "in half precision, single entries are to be rounded as a merge rounds them"
    site = at[0]
    static = ("cost", type(get_method(p.method)), keys(p), bare(p), activation_signature(site))
    shapes = tuple(t.shape for t in p.tensors.values())  # equal configs may give targets ranks of their own
    key = (static, shapes, signature(site.x.meta["val"]), signature(site.parameter.meta["val"]))
    found = known.get(key)
    if found is None:  # the table may forget it again at any time
        found = known[key] = costs(p, site)
    activation, weight = found
    return (
        f"the weight form is cheaper here: {weight / activation:.2f} of the work"
        if weight < CHEAPER * activation
        else ""
    )


def costs(p: Placement, site: Site) -> tuple[float, float]:
    """Of the operator at a site with the adapter, forward and backward: in activation form, in weight form."""
    method, names = p.rule, tuple(p.tensors)
    W, x, *inputs = (n.meta["val"] for n in (site.parameter, site.x, *activation_inputs(site)))
    bias = bias_of(site)
    b = None if bias is None else bias.meta["val"]
    theta = [torch.empty(t.shape, dtype=t.dtype_on(W.dtype), device="meta") for t in p.tensors.values()]
    before, after = ([f.build(site, method, p.target, p.config, names) for f in forms_of(method) if f.place == place]
                     for place in ("input", "output"))  # fmt: skip
    changed, groups = weight_function(method, p.target, p.config, names), 1 if method.dense_groups(p.target) else None

    def activation(x, W, b, *tensors):
        theta, inputs = tensors[: len(names)], tensors[len(names) :]
        mapped = x
        for function in before:
            (mapped,) = function(mapped, *theta)
        y = replayed(site, inputs, mapped, W, b)
        for function in after:
            (y,) = function(y, x, W, b, *theta, *inputs)
        return y

    def weight(x, W, b, *tensors):
        new_W, new_b = changed(W, b, *tensors[: len(names)])
        return replayed(site, tensors[len(names) :], x, new_W, new_b, groups)

    trained = [True, False, False, *(t.trainable for t in p.tensors.values()), *(False for _ in inputs)]
    arguments = [x, W, b, *theta, *inputs]
    return cost(activation, arguments, trained), cost(weight, arguments, trained)


def composed(i: int, last_weight: int) -> str:
    return "a later adapter on this target needs the weight form" if i < last_weight else ""


def readable(node: fx.Node, target: Target) -> tuple[list[Site], str]:
    """The sites of a target, and "" or why the activation form cannot be used at them."""
    found, reason = sites(node)
    if not reason and any(s.stored_transposed != target.transposed for s in found):
        reason = "the operator reads the weight transposed, against PEFT's files"
    if not reason and node.meta["val"].shape != stored_shape(target):
        reason = "a merge has changed the weight's shape"
    return found, reason


def lowering(p: Placement, found: tuple[list[Site], str] | None, reason: str, order: str) -> Lowering:
    """reason: why the weight form is needed by itself, order: because of others; "" if it is not."""
    if found is None:
        return Lowering(p, "none", "no operator of the graph reads this parameter")
    at, because = tuple(found[0]), reason or order
    if not because:
        return Lowering(p, "activation", "", at)
    if p.lowering == "activation":
        return Lowering(p, "refused", f"lowering='activation' was asked for, but {because}")
    if lost := p.rule.activation_only(p.target, p.config):
        return Lowering(p, "refused", f"{lost} needs the activation form, but {because}")
    if dropout := p.rule.input_dropout(p.target, p.config):
        if order or p.lowering == "weight" or not at or sites(at[0].parameter)[1]:
            return Lowering(p, "refused", f"dropout {dropout} on the input needs a form at the operator, but {because}")
        return Lowering(p, "replay", because, at)
    return Lowering(p, "weight", because, at)


@dataclass(frozen=True)
class Inject(Pass):
    """gated: the buffer `peft_fx.gates.<adapter>.open` says how much of each adapter acts. aware: packed weights are packed
    again."""

    placements: tuple[Placement, ...]
    gated: bool = False
    aware: bool = False

    def idle(self, gm):
        return not self.placements

    def call(self, gm):
        placements = as_weights(gm, self.placements) if self.aware else self.placements
        decided = lower(gm.graph, placements, gm.meta[ROOT].base.traces)
        refused = [Refusal(x.placement.target.name, f"refused: {x.reason}") for x in decided if x.form == "refused"]
        if refused := [*refused, *clashes(self.placements)]:
            raise RecipeError("\n".join(one_line_each(refused)))
        insert = Insert(gm, self.gated, self.aware)
        for x in decided:
            if x.form != "none":
                getattr(insert, x.form)(x)
        return len(decided)


def as_weights(gm: fx.GraphModule, placements: Sequence[Placement]) -> tuple[Placement, ...]:
    """The placements, those on packed weights in weight form. Raises RecipeError for two on one packed weight."""
    count = Counter(p.target.name for p in placements)
    found = tuple(p if packed_of(gm, p.target.name) is None else replace(p, lowering="weight") for p in placements)
    if twice := next(
        (p for p, now in zip(placements, found, strict=True) if p is not now and count[p.target.name] > 1), None
    ):
        raise RecipeError(
            f"{twice.target.name}: {count[twice.target.name]} adapters act on this packed weight, and it would be rounded after "
            "each: train one after the other, with set_adapter"
        )
    return found


class Insert:
    """The ways of inserting, over one graph module."""

    def __init__(self, gm: fx.GraphModule, gated: bool, aware: bool = False):
        self.gm, self.graph, self.gated, self.aware = gm, gm.graph, gated, aware
        self.nodes: dict[str | tuple[str, str], fx.Node] = dict(parameter_nodes(gm.graph).items())
        self.fake_mode = fake_mode_of(gm)
        self.splice = Splicer(gm, self.fake_mode, gm.meta[ROOT].base.traces)
        self.key = ConfigKeys()
        self.inputs: dict[fx.Node, fx.Node] = {}  # operator node -> the input that it has in the base graph
        self.heads: dict[fx.Node, fx.Node] = {}  # operator node or parameter node -> its latest adapted value
        self.splices = itertools.count()
        self.first_call = next(n for n in self.graph.nodes if n.op not in ("placeholder", "get_attr"))

    def activation(self, x: Lowering) -> None:
        for form in forms_of(x.placement.rule):
            self.at_operators(x, form)

    def replay(self, x: Lowering) -> None:
        self.at_operators(x, REPLAY)

    def at_operators(self, x: Lowering, form: Form) -> None:
        p = x.placement
        theta, names = self.theta(p)
        for site in x.sites:
            # the operator reads what weight forms before this one made of the parameter
            site = replace(site, parameter=self.heads.get(site.parameter, site.parameter))
            function = form.build(site, p.rule, p.target, p.config, names)
            static = (form.build, type(get_method(p.method)), self.key(p), bare(p), activation_signature(site))
            label = tag(p, x.form, next(self.splices))
            original = self.inputs.setdefault(site.node, site.x)
            if form.place == "input":
                (mapped,) = self.traced(p, function, static, [original, *theta], site.node, label, after=False)
                self.mark(original, mapped, label)
                site.node.replace_input_with(original, mapped)
                continue
            y = self.heads.get(site.node, site.node)
            inputs = [site.parameter, bias_of(site), *theta, *activation_inputs(site)]
            (result,) = self.traced(p, function, static, [y, original, *inputs], y, label)
            self.replace(y, result, label)
            self.heads[site.node] = result

    def weight(self, x: Lowering) -> None:
        p, method = x.placement, x.placement.rule
        theta, names = self.theta(p)
        W = self.nodes[p.target.name]
        b = self.nodes.get(p.target.bias_name)  # of the base, or one that an adapter before this one added
        old_W, old_b = self.heads.get(W, W), b if b is None else self.heads.get(b, b)
        function = weight_function(method, p.target, p.config, names)
        static: tuple = ("weight", type(get_method(p.method)), self.key(p), bare(p))
        packed = packed_of(self.gm, p.target.name) if self.aware else None
        if packed is not None:
            theta = [*theta, *cast("list[fx.Node]", W.args[0])]
            function = requantized_function(method, p.target, p.config, names, packed)
            static = ("requantized", packed.text, *static)
        first = min(old_W.users) if old_b is None else min([*old_W.users, *old_b.users])
        label = tag(p, x.form, next(self.splices))
        new_W, new_b = self.traced(p, function, static, [old_W, old_b, *theta], first, label, after=False)
        if new_W is not old_W:  # a method may change the bias alone
            self.replace(old_W, new_W, label)
            self.heads[W] = new_W
        if new_b is not None and new_b is not old_b:
            if b is None or old_b is None:
                add_bias(x.sites, new_b)
                self.nodes[p.target.bias_name] = new_b
            else:
                self.replace(old_b, new_b, {**label, "target": p.target.bias_name})
                self.heads[b] = new_b
        if method.dense_groups(p.target):
            drop_groups(x.sites)

    def traced(self, p: Placement, function, static, arguments, like: fx.Node, label: dict, after: bool = True):
        """Nodes for `function(*arguments)`, behind the adapter's gate where there are gates."""
        if not self.gated:
            return self.splice(function, static, arguments, like, label, after)
        gate = self.stored(gate_name(p.adapter))
        return self.splice(gated(function), (gated, *static), [*arguments, gate], like, label, after)

    def theta(self, p: Placement) -> tuple[list[fx.Node], tuple[str, ...]]:
        """Nodes for the placement's tensors, ahead of the first operation, so that any site can use them."""
        return [self.tensor(p.resolve(name)) for name in p.tensors], tuple(p.tensors)

    def stored(self, name: str) -> fx.Node:
        """The node that reads a tensor of ours, by its full name."""
        if name not in self.nodes:
            with self.graph.inserting_before(self.first_call):
                node = self.nodes[name] = self.graph.get_attr(name)
            node.meta["val"] = fake_of(self.fake_mode, tensor_of(self.gm, name))
        return self.nodes[name]

    def tensor(self, shared: Shared) -> fx.Node:
        name = f"{ADAPTERS}.{shared.name}"
        node = self.stored(name)
        if not shared.transposed:
            return node
        if (name, "t") not in self.nodes:
            with self.graph.inserting_before(self.first_call):
                view = self.nodes[name, "t"] = self.graph.call_function(aten.t.default, (node,))
            view.meta = {"val": node.meta["val"].t(), "custom": {TAG: {"target": shared.name, "role": "body"}}}
        return self.nodes[name, "t"]

    def replace(self, old: fx.Node, new: fx.Node, label: dict) -> None:
        """Points every reader of `old` at `new`, but for the nodes of this splice; tags both ends, so that it can be undone."""
        old.replace_all_uses_with(
            new, delete_user_cb=lambda user: tag_of(user).get("splice") != label["splice"], propagate_meta=False
        )
        self.mark(old, new, label)

    def mark(self, old: fx.Node, new: fx.Node, label: dict) -> None:
        new.meta["custom"][TAG] = {**label, "role": "result"}
        add_tag(old, base_of=[*tag_of(old).get("base_of", ()), [label["splice"], label["target"]]])


class ConfigKeys:
    """The text of a placement's config: the same for equal configs of other runs. Made once per config."""

    def __init__(self):
        self.texts: dict[int, str] = {}

    def __call__(self, p: Placement) -> str:
        if id(p.config) not in self.texts:
            self.texts[id(p.config)] = repr(p.config)
        return self.texts[id(p.config)]


def tag(p: Placement, form: str, splice: int) -> dict:
    """What every inserted node says of itself: which splice it belongs to, for whom, and in which form."""
    return {"splice": splice, "adapter": p.adapter, "target": p.target.name, "method": p.method, "form": form}


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
        set_argument(site.node, cast(int, site.operator.bias), bias)


def drop_groups(sites: Sequence[Site]) -> None:
    """Makes grouped convolutions ungrouped: their weight now holds every channel."""
    for site in sites:
        set_argument(site.node, cast(int, site.operator.groups), 1)


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
