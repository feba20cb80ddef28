"""Several adapters in one batch: each row of a call goes through an adapter of its own, or through none.

    adapter_ids (rows,)         one more input: the position of each row's adapter, -1 for the base
    factored updates, linear    y + B[id] (A[id] x) s[id]                  stacked factors, gathered by row, two batched products
    elsewhere                   y + B (m[id] * A x)                        all factors side by side; m[id] keeps the row's own
    maps and branches           where(id == k, f_k(x), x) for every k      each on all rows, which keep their own

Measured on SmolLM2's shapes, rank 16, 8 rows of 32 tokens, 2 to 8 adapters: the gather costs 1.1 to 1.4 times one adapter's
factors, all factors side by side 1.7 to 7 times; only at 1 token per row with up to 4 adapters is that the faster one, by
some 20 us per operator. So linear operators always gather, and there is no rule to tune. The factors of a lookup or a
convolution are side by side: a lookup reads few rows of A, and a convolution by rows would fix their number.

A map or branch runs once per adapter: a call of two layers of that width with 4 adapters took 1.3 (IA3) to 1.7 times (OFT) as
long as with one. Under vmap over rows it would run once, but some of vmap's rules fix the number of rows in the graph.

Which axis of an activation holds the rows follows from the symbolic sizes: the batch is the first axis of the first tensor
among the inputs, and that symbol has to be one axis of the operator's input, or, where a view has merged it with others,
the outermost or innermost part of its first axis.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import sympy
import torch
from torch import fx, nn
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from ...errors import GraphError
from ...methods import get_method
from ...methods.base import Additive
from ...planning.plan import Placement
from ...store.tensors import INPUTS, store_of
from ...target import sizes
from ..core.base import Pass
from ..core.fakes import fake_mode_of
from ..core.nodes import calling, input_of
from ..forms.lowering import (
    activation_inputs,
    activation_signature,
    bias_of,
    cast,
    forms_of,
    from_canonical,
    replayed,
    to_canonical,
    widened,
)
from ..match.operators import schema_name
from ..match.readers import Site
from .inject import Insert, bare, readable, tag

IDS = "adapter_ids"
ROWS = f"{INPUTS}.rows"
VIEWS = {"aten::view", "aten::reshape", "aten::_unsafe_view", "aten::flatten.using_ints"}


class RowIds(nn.Module):
    """Raises GraphError for `adapter_ids` that do not fit the call; compiled code checks their range by itself."""

    _is_impure = True  # torch.fx: not dead code, though no node reads it

    def __init__(self, names: tuple[str, ...]):
        super().__init__()
        self.names = names

    def forward(self, ids, x):
        if not isinstance(ids, torch.Tensor) or ids.dtype != torch.int64 or ids.dim() != 1:
            given = f"{ids.dtype} {sizes(ids.shape)}" if isinstance(ids, torch.Tensor) else type(ids).__name__
            raise GraphError(f"{IDS}: expected a tensor of int64 (rows,), given {given}")
        if ids.shape[0] != x.shape[0]:
            raise GraphError(f"{IDS}: expected one per row, {x.shape[0]} for this batch, given {ids.shape[0]}")
        if ids.device.type == "cpu" and not torch.compiler.is_compiling():
            out = ids[(ids < -1) | (ids >= len(self.names))]
            if len(out):
                known = ", ".join(f"{i}: {name}" for i, name in enumerate(self.names))
                raise GraphError(f"{IDS}: {out[0].item()} is no adapter; expected -1 for the base, {known}")


# The graph's further input


def batch_of(graph: fx.Graph) -> tuple[fx.Node, sympy.Symbol]:
    """The first tensor among the inputs and the symbol of its rows. Raises GraphError where there is none."""
    inputs = [n for n in graph.find_nodes(op="placeholder") if isinstance(n.meta.get("val"), torch.Tensor)]
    inputs = [n for n in inputs if n.meta["val"].dim()]
    if not inputs:
        raise GraphError("mixed_batch: no input of this graph is a tensor with rows")
    first = inputs[0]
    rows = size(first.meta["val"].shape[0])
    if not rows.is_Symbol:
        raise GraphError(
            f"mixed_batch: the number of rows of {first.name} was fixed to {rows} by capture, so that they cannot be told from "
            "other axes; capture the model with dynamic sizes, and with a batch of 2 or more"
        )
    if any(rows in size(s).free_symbols for n in inputs for s in n.meta["val"].shape[1:]):
        raise GraphError(f"mixed_batch: another axis of the inputs has the size of the rows of {first.name}, {rows}")
    return first, rows


def size(value) -> sympy.Expr:
    """A size as an expression."""
    return value.node.expr if isinstance(value, torch.SymInt) else sympy.Integer(value)


def add_input(gm: fx.GraphModule, like: fx.Node) -> fx.Node:
    """The placeholder `adapter_ids`, the last input, by keyword. like: an input whose first axis is the rows."""
    last = gm.graph.find_nodes(op="placeholder")[-1]
    with gm.graph.inserting_after(last):
        node = gm.graph.placeholder(IDS)
    value = like.meta["val"]
    with fake_mode_of(gm):
        node.meta["val"] = torch.empty((value.shape[0],), dtype=torch.int64, device=value.device)
    info = calling(gm.graph)
    positional, named = info.in_spec.children()
    with_ids = pytree.tree_structure((0, {name: 0 for name in (*named.context, IDS)}))
    named = pytree.TreeSpec(dict, with_ids.child(1).context, [*named.children(), with_ids.child(1).child(-1)])
    set_inputs(gm.graph, [*info.orig_args, IDS], pytree.TreeSpec(tuple, None, [positional, named]))
    return node


def drop_input(graph: fx.Graph) -> None:
    """Undoes `add_input`: takes out the placeholder, which nothing reads any more."""
    graph.erase_node(next(n for n in graph.find_nodes(op="placeholder") if n.target == IDS))
    info = calling(graph)
    positional, named = info.in_spec.children()
    kept = [i for i, name in enumerate(named.context) if name != IDS]
    named = pytree.TreeSpec(dict, [named.context[i] for i in kept], [named.child(i) for i in kept])
    set_inputs(graph, [a for a in info.orig_args if a != IDS], pytree.TreeSpec(tuple, None, [positional, named]))


def set_inputs(graph: fx.Graph, names: list[str], in_spec: pytree.TreeSpec) -> None:
    graph.set_codegen(_PyTreeCodeGen(_PyTreeInfo(names, in_spec, calling(graph).out_spec)))


# Where the rows are


@dataclass(frozen=True)
class Rows:
    """Axis of an activation that holds the rows, once `open` has taken apart a first axis that is merged."""

    axis: int
    merged: bool = False

    def open(self, t: torch.Tensor, count: int) -> torch.Tensor:
        if not self.merged:
            return t
        return t.reshape(*((count, -1) if self.axis == 0 else (-1, count)), *t.shape[1:])

    def close(self, t: torch.Tensor) -> torch.Tensor:
        return t.flatten(0, 1) if self.merged else t

    def along(self, v: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """A vector of the rows, or (rows, n), shaped to broadcast against an opened `t`."""
        return v.reshape(*(-1 if i == self.axis else 1 for i in range(t.dim())))

    def chosen(self, keep: torch.Tensor, new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
        """`new` in the rows where `keep` holds, `old` elsewhere."""
        new, opened = self.open(new, keep.shape[0]), self.open(old, keep.shape[0])
        return self.close(torch.where(self.along(keep, opened), new, opened))


def rows_of(node: fx.Node, batch: sympy.Symbol) -> Rows | None:
    """Where the rows are in a node's value; None if they are nowhere to be seen."""
    axes = [i for i, s in enumerate(node.meta["val"].shape) if size(s) == batch]
    if len(axes) == 1:
        return Rows(axes[0])
    while not axes and (before := unchanged(node)) is not None:
        node = before
    if axes or schema_name(node) not in VIEWS:
        return None
    old, new = ([size(s) for s in n.meta["val"].shape] for n in (input_of(node), node))
    if old.count(batch) != 1 or sympy.prod(old) != sympy.prod(new):
        return None
    if old[0] == batch and sympy.cancel(new[0] / batch).as_numer_denom()[1] == 1:
        return Rows(0, merged=True)
    at = old.index(batch)
    return Rows(1, merged=True) if new[0] == sympy.prod(old[: at + 1]) else None


def unchanged(node: fx.Node) -> fx.Node | None:
    """What a node computes number by number from, with the same sizes; None for anything else."""
    if not isinstance(node.target, torch._ops.OpOverload) or len(node.all_input_nodes) != 1:
        return None
    before = node.all_input_nodes[0]
    value = before.meta.get("val")
    same = isinstance(value, torch.Tensor) and value.shape == node.meta["val"].shape
    return before if same and (torch.Tag.pointwise in node.target.tags or schema_name(node) in VIEWS) else None


# What goes in at one operator


@dataclass(frozen=True)
class Part:
    """One adapter's placement at a target. id: in `adapter_ids`."""

    id: int
    placement: Placement

    @property
    def factored(self) -> bool:
        rule = self.placement.rule
        forms = [t for t in type(rule).__mro__ if t is Additive]
        return (
            len(forms_of(rule)) == 1
            and bool(forms)
            and isinstance(rule, Additive)
            and type(rule).between is Additive.between
        )

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.placement.tensors)

    @property
    def dropout(self) -> float:
        return self.placement.rule.input_dropout(self.placement.target, self.placement.config)

    def built(self, site: Site, form) -> Callable:
        p = self.placement
        return form.build(site, p.rule, p.target, p.config, self.names)


def fault(p: Placement, at: Sequence[Site], reason: str, batch: sympy.Symbol) -> str:
    """Why a placement cannot act on some rows only; "" if it can."""
    forms = forms_of(p.rule)
    if not forms:
        return f"{p.method} rewrites the weight, which all rows share"
    if reason:
        return f"{reason}, and the weight form is shared by all rows"
    for site in at:
        kind = site.operator.kind
        if kind == "expert":
            return "experts take tokens in an order of their own, in which no row can be told"
        if any(form.kinds is not None and kind not in form.kinds for form in forms):
            return f"{p.method} has only the weight form on {kind}, which all rows share"
        if rows_of(site.x, batch) is None:
            return f"its input has sizes {sizes(site.x.meta['val'].shape)}, where the rows of the batch, {batch}, are no axis"
    return ""


@dataclass(frozen=True)
class MixedBatch(Pass):
    """adapters: what each one puts where, by id."""

    names: tuple[str, ...]
    adapters: tuple[tuple[Placement, ...], ...]

    def call(self, gm):
        first, batch = batch_of(gm.graph)
        ids = add_input(gm, first)
        work = InsertMixed(gm, ids, len(self.adapters))
        by_target: dict[str, list[Part]] = {}
        for i, placements in enumerate(self.adapters):
            for p in placements:
                by_target.setdefault(p.target.name, []).append(Part(i, p))
        at, faults = {}, []
        for name, parts in by_target.items():
            if name in work.nodes and work.nodes[name].users:
                at[name], reason = readable(work.nodes[name], parts[0].placement.target)
                found = ((x.placement.adapter, fault(x.placement, at[name], reason, batch)) for x in parts)
                faults += [
                    f"{name}: adapter {adapter!r} refused in a mixed batch: {why}" for adapter, why in found if why
                ]
        if faults:
            raise GraphError("\n".join(faults))
        store_of(gm).inputs.add_module("rows", RowIds(self.names))
        with gm.graph.inserting_before(work.first_call):
            work.check = gm.graph.call_module(ROWS, (ids, first))
        work.check.meta["val"] = None
        for name, sites in at.items():
            for site in sites:
                work.at_operator(site, by_target[name], typing.cast(Rows, rows_of(site.x, batch)))
        return sum(map(len, at.values()))


class InsertMixed(Insert):
    """The ways of inserting, over one graph module."""

    def __init__(self, gm: fx.GraphModule, ids: fx.Node, count: int):
        super().__init__(gm, gated=False)
        self.ids, self.count = ids, count
        self.check: fx.Node  # the call that checks the ids
        self.local: dict[tuple[int, ...], list[fx.Node]] = {}

    def at_operator(self, site: Site, parts: Sequence[Part], rows: Rows) -> None:
        factored = [x for x in parts if x.factored]
        others = [x for x in parts if not x.factored]
        if factored:
            build = gathered if site.operator.kind == "linear" else side_by_side
            self.output(site, factored, rows, build(site, factored, rows), (build,))
        for x in others:
            for form in forms_of(x.placement.rule):
                insert = self.output if form.place == "output" else self.input
                insert(site, [x], rows, by_choice(site, x, form, rows), (by_choice, form.build))

    def output(self, site: Site, parts: Sequence[Part], rows: Rows, function: Callable, how: tuple) -> None:
        label, y = self.label(parts), self.heads.get(site.node, site.node)
        original = self.inputs.setdefault(site.node, site.x)
        inputs = [site.parameter, bias_of(site), *self.chosen(parts), *self.thetas(parts), *activation_inputs(site)]
        (result,) = self.splice(function, self.static(site, parts, rows, how), [y, original, *inputs], y, label)
        self.replace(y, result, label)
        self.heads[site.node] = result

    def input(self, site: Site, parts: Sequence[Part], rows: Rows, function: Callable, how: tuple) -> None:
        label, x = self.label(parts), input_of(site.node, site.node.args.index(site.x))
        original = self.inputs.setdefault(site.node, site.x)
        arguments = [x, original, *self.chosen(parts), *self.thetas(parts)]
        static = (*self.static(site, parts, rows, how), x is original)  # a trace cannot tell one operand from itself
        (mapped,) = self.splice(function, static, arguments, site.node, label, after=False)
        self.mark(x, mapped, label)
        site.node.replace_input_with(x, mapped)

    def label(self, parts: Sequence[Part]) -> dict:
        adapters, methods = (
            ", ".join(dict.fromkeys(getattr(x.placement, n) for x in parts)) for n in ("adapter", "method")
        )
        return {**tag(parts[0].placement, "activation", next(self.splices)), "adapter": adapters, "method": methods}

    def static(self, site: Site, parts: Sequence[Part], rows: Rows, how: tuple) -> tuple:
        found = [(type(get_method(x.placement.method)), self.key(x.placement), bare(x.placement)) for x in parts]
        return ("mixed", *how, *found, rows, activation_signature(site))

    def thetas(self, parts: Sequence[Part]) -> list[fx.Node]:
        return [node for x in parts for node in self.theta(x.placement)[0]]

    def chosen(self, parts: Sequence[Part]) -> list[fx.Node]:
        """Nodes of two vectors of the rows: the position of the row's adapter among `parts`, and whether it is one of them."""
        known = tuple(x.id for x in parts)
        if known not in self.local:
            first = not self.local
            count = self.count

            def positions(ids):
                if first:
                    inside = ((ids >= -1) & (ids < count)).all()
                    torch._assert_async(inside, f"{IDS}: expected -1 for the base, or 0 to {count - 1}")
                if known == tuple(range(count)):
                    return ids.clamp(min=0), ids >= 0
                index = torch.full_like(ids, -1)
                for i, known_id in enumerate(known):
                    index = torch.where(ids == known_id, i, index)
                return index.clamp(min=0), index >= 0

            label = self.label(parts)
            static = ("positions", known, count, first)
            self.local[known] = self.splice(positions, static, [self.ids], self.check, label)
        return self.local[known]


# Functions at an operator: (y, x, W, b, index, chosen, *thetas, *inputs) -> (y',), or (x', x, index, chosen, *thetas) -> (x'',)


def thetas_of(parts: Sequence[Part], tensors: Sequence) -> tuple[list[dict], Sequence]:
    """Each part's tensors by name, and what is left over."""
    found = []
    for x in parts:
        found.append(dict(zip(x.names, tensors[: len(x.names)], strict=True)))
        tensors = tensors[len(x.names) :]
    return found, tensors


def factors_of(parts: Sequence[Part], thetas: Sequence[dict], W: torch.Tensor, dtype: torch.dtype) -> list:
    """Each part's factors, in `dtype`; scales stay as they are."""
    found = []
    for x, theta in zip(parts, thetas, strict=True):
        p = x.placement
        if p.rule.reads:
            theta = theta | {"W": widened(to_canonical(W, p.target), list(theta.values()))}
        f = typing.cast(Additive, p.rule).factors(theta, p.target, p.config)
        found.append(replace(f, A=cast(f.A, dtype), B=cast(f.B, dtype)))
    return found


def dropped(x: torch.Tensor, parts: Sequence[Part], rows: Rows, index, chosen) -> torch.Tensor:
    """`x` with each row's own dropout."""
    if len(rates := {part.dropout for part in parts}) == 1:
        (rate,) = rates
        return F.dropout(x, rate, True) if rate else x
    result = x
    for rate in sorted(rates - {0.0}):
        keep = torch.zeros_like(chosen)
        for i, part in enumerate(parts):
            keep = keep | (index == i) if part.dropout == rate else keep
        result = rows.chosen(keep & chosen, F.dropout(x, rate, True), result)
    return result


def biases(found: Sequence, index, chosen, dtype: torch.dtype) -> torch.Tensor | None:
    """(rows, out): the bias that each row's factors add; None if none do."""
    if all(f.bias is None for f in found):
        return None
    some = next(f.bias for f in found if f.bias is not None)
    stacked = torch.stack([torch.zeros_like(some) if f.bias is None else f.bias * f.scale for f in found])
    return cast(stacked.index_select(0, index) * chosen.unsqueeze(1), dtype)


def gathered(site: Site, parts: Sequence[Part], rows: Rows) -> Callable:
    """Factors on a linear operator: stacked, padded to the largest rank, gathered by row."""

    def function(y, x, W, b, index, chosen, *tensors):
        thetas, _ = thetas_of(parts, tensors)
        found = factors_of(parts, thetas, W, y.dtype)
        rank, count = max(f.A.shape[0] for f in found), index.shape[0]
        A = torch.stack([padded(f.A, 0, rank) for f in found]).index_select(0, index)
        B = torch.stack([padded(f.B, 1, rank) for f in found]).index_select(0, index)
        scale = torch.stack([f.scale for f in found]).index_select(0, index) * chosen
        x = rows.open(dropped(x, parts, rows, index, chosen), count).movedim(rows.axis, 0)
        old = rows.open(y, count).movedim(rows.axis, 0)
        h = torch.bmm(x.reshape(count, -1, x.shape[-1]), A.mT)
        h = cast(h * scale.reshape(-1, 1, 1), y.dtype)
        flat = old.reshape(count, -1, old.shape[-1])
        if (bias := biases(found, index, chosen, y.dtype)) is not None:
            flat = flat + bias.unsqueeze(1)
        new = torch.baddbmm(flat, h, B.mT).reshape(old.shape)
        return (rows.close(new.movedim(0, rows.axis)),)

    return function


def padded(t: torch.Tensor, axis: int, length: int) -> torch.Tensor:
    """A matrix with zeros appended along `axis`."""
    missing = length - t.shape[axis]
    return F.pad(t, (0, 0, 0, missing) if axis == 0 else (0, missing)) if missing else t


def side_by_side(site: Site, parts: Sequence[Part], rows: Rows) -> Callable:
    """Factors on any operator: all ranks at once, of which each row keeps its adapter's."""
    channels, target = site.operator.channels, parts[0].placement.target
    groups = target.groups

    def function(y, x, W, b, index, chosen, *tensors):
        thetas, inputs = thetas_of(parts, tensors)
        found = factors_of(parts, thetas, W, y.dtype)
        x, count = dropped(x, parts, rows, index, chosen), index.shape[0]
        parts_of_h = []
        for i, f in enumerate(found):
            part = replayed(site, inputs, x, from_canonical(f.A, target), groups=1)
            part = rows.open(cast(part * f.scale, y.dtype), count)
            part = rows.close(part * rows.along(cast((index == i) & chosen, y.dtype), part))
            parts_of_h.append(part.unflatten(channels, (groups, -1)))
        # the operator's groups see ranks of every adapter: group by group, adapter by adapter
        h = torch.cat(parts_of_h, channels).flatten(channels - 1, channels)
        B = torch.cat([f.B for f in found], 1)
        d = site.operator.second(
            lambda h, B, bias: replayed(site, inputs, h, from_canonical(B, target), bias, groups=1), h, B, None, groups
        )
        if (bias := biases(found, index, chosen, y.dtype)) is not None:
            opened = rows.open(d, count)
            shape = [1] * opened.dim()
            shape[rows.axis], shape[channels] = bias.shape
            d = rows.close(opened + bias.reshape(shape))
        return (y + d,)

    return function


def by_choice(site: Site, part: Part, form, rows: Rows) -> Callable:
    """One adapter's own form on all rows; its rows keep the result."""
    function = part.built(site, form)

    def output(y, x, W, b, index, chosen, *tensors):
        return (rows.chosen(chosen, function(y, x, W, b, *tensors)[0], y),)

    def mapped(latest, x, index, chosen, *tensors):
        return (rows.chosen(chosen, function(x, *tensors)[0], latest),)

    return output if form.place == "output" else mapped
