"""A method on a stack of expert weights: the method itself on each of them.

Each expert is to the method a linear weight (out, in) of its own. Its tensors get a leading axis for the experts, what all
targets share stays shared, and its functions run over the stack under `torch.vmap`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import cast

import torch
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, get_proxy_mode, make_fx

from ..target import Target
from .base import Additive, Factors, Method, Pieces, Tensor, Together


def on_target(method: Method, target: Target, tensors: dict[str, Tensor] | None = None) -> Method:
    """The method as it acts on `target`. tensors: what it has there, once that is known."""
    if target.experts is None or method.stacks:
        return method
    factored = isinstance(method, Additive) and type(method).between is Additive.between
    kind = StackedAdditive if factored else Stacked
    return kind(method, frozenset(n for n, t in (tensors or {}).items() if t.stacked))


def each(target: Target, index: int | None = None) -> Target:
    """One expert of a stack, as a linear weight without a bias."""
    return replace(target, kind="linear", shape=target.shape[1:], has_bias=False, expert=index)


class Stacked(Method):
    """Everything that a plan asks of a method, answered for a stack.

    one: the method of a single expert. names: tensors with an axis for the experts.
    """

    def __init__(self, one: Method, names: frozenset[str]):
        self.one, self.names, self.name, self.Config = one, names, one.name, one.Config
        self.refuses, self.reads, self.no_weight = one.refuses, one.reads, one.no_weight
        self.undropped = one.undropped and partial(self.over_stack, one.undropped)

    def check(self, target, config):
        return self.one.refuses.get("linear") or self.one.check(each(target), config)

    def tensors(self, target, config):
        specs = self.one.tensors(each(target), config)
        return {name: stack([spec] * target.experts, specs) for name, spec in specs.items()}

    def input_dropout(self, target, config):
        return self.one.input_dropout(each(target), config)

    def activation_only(self, target, config):
        return self.one.activation_only(each(target), config)

    def literals(self, target, config):
        return self.one.literals(each(target), config)

    def neutral(self, target, config):
        return self.one.neutral(each(target), config)

    def own_rows(self, target, config):
        return self.one.own_rows(each(target), config)

    def over_stack(self, weight, W, b, theta, target, config):
        function = lambda W, theta: weight(W, None, theta, each(target), config)[0]  # noqa: E731
        return batched(function, W, theta, self.names), b

    def weight(self, W, b, theta, target, config):
        return self.over_stack(self.one.weight, W, b, theta, target, config)

    def training_weight(self, W, b, theta, target, config):
        drops = any(getattr(config, f.name) for f in fields(config) if f.name.endswith("dropout"))
        if not drops or type(self.one).training_weight is Method.training_weight:
            return self.weight(W, b, theta, target, config)
        # a batched dropout would lose the literal that follows the graph's mode
        chosen = [{n: t[e] if n in self.names else t for n, t in theta.items()} for e in range(target.experts)]
        made = [self.one.training_weight(W[e], None, theta_e, each(target), config) for e, theta_e in enumerate(chosen)]
        return torch.stack([W for W, _ in made]), b


class StackedAdditive(Stacked, Additive):  # type: ignore[misc]  # nobody asks a stack's `weight` for `out`
    """Keeps the factored form: one pair of factors per expert."""

    def factors(self, theta, target, config):
        def one(W, theta):
            f = cast(Additive, self.one).factors(theta | ({} if W is None else {"W": W}), each(target), config)
            return f.A, f.B, f.scale.reshape(1, 1)

        theta = dict(theta)
        W = theta.pop("W", None)
        A, B, scale = batched(one, W, theta, self.names)
        return Factors(A, B * scale, scale.new_ones(()))


def batched(function: Callable, W: torch.Tensor | None, theta: dict[str, torch.Tensor], stacked: frozenset[str]):
    """`function(W, theta)` over the first axis of W and of the tensors named in `stacked`.

    Pre-dispatch tracing cannot look through vmap: there, what it does is traced on its own and played back.
    """
    names = list(theta)
    present = [] if W is None else [W]

    def call(*tensors):
        values = dict(zip(names, tensors[len(present) :], strict=True))
        return function(tensors[0] if present else None, values)

    axes = (*(0 for _ in present), *(0 if n in stacked else None for n in names))
    over_stack = torch.vmap(call, in_dims=axes)
    arguments = (*present, *theta.values())
    if get_proxy_mode() is None:
        return over_stack(*arguments)
    with disable_proxy_modes_tracing():
        traced = make_fx(over_stack)(*arguments)
    traced.graph.eliminate_dead_code()
    return traced(*arguments)


def stack(specs: Sequence[Tensor], own: dict[str, Tensor]) -> Tensor:
    """One description for the equal tensors of all experts, each initialised as its own says."""
    first = specs[0]
    stacked = [need in own for need in first.needs]

    pad = tuple((axis + 1, blocks) for axis, blocks in first.pad)
    pieces = first.pieces and stacked_pieces([s.pieces for s in specs if s.pieces is not None], stacked, own)
    init = partial(initialise, specs, stacked)
    return replace(first, shape=(len(specs), *first.shape), init=init, pad=pad, stacked=True, pieces=pieces)


def initialise(specs: Sequence[Tensor], stacked: Sequence[bool], tensor, W, *needed) -> None:
    """For `partial(initialise, specs, stacked)`: each expert's part as its own description says."""
    for e, spec in enumerate(specs):
        spec.init(tensor[e], None if W is None else W[e], *one_of(needed, stacked, e))


def one_of(tensors: Sequence[torch.Tensor], stacked: Sequence[bool], e: int) -> list[torch.Tensor]:
    """Expert e's part of the tensors that have the axis, and the others."""
    return [t[e] if s else t for t, s in zip(tensors, stacked, strict=True)]


def stacked_pieces(each_pieces: Sequence[Pieces], needed_stacked: Sequence[bool], own: dict[str, Tensor]) -> Pieces:
    """The pieces of the first expert's tensor, then those of the second's, ..."""
    count, reads = each_pieces[0].count, each_pieces[0].reads
    read_stacked = [name in own for name in reads]

    def split(tensor, *others):
        found = (p.split(tensor[e], *one_of(others, read_stacked, e)) for e, p in enumerate(each_pieces))
        return [piece for pieces in found for piece in pieces]

    def join(tensor, pieces, *needed):
        for e, p in enumerate(each_pieces):
            part = pieces[e * count : (e + 1) * count]
            if fault := p.join(tensor[e], part, *one_of(needed, needed_stacked, e)):
                return f"expert {e}: {fault}"
        return None

    return Pieces(count * len(each_pieces), join, split, reads)


def unstacked(targets: Sequence[Target], method: Method) -> list[Target]:
    """The targets as `Method.together` sees them: every expert is one."""
    return [
        piece
        for t in targets
        for piece in ([each(t, e) for e in range(t.experts)] if t.experts and not method.stacks else [t])
    ]


def restacked(together: Together, targets: Sequence[Target]) -> Together:
    """What `together` said of single experts, said of their stacks."""
    own = dict(together.own)
    for t in targets:
        pieces = [own.pop(each(t, e).name, {}) for e in range(t.experts or 0)]
        if any(pieces):
            own[t.name] = {name: stack([p[name] for p in pieces], pieces[0]) for name in pieces[0]}
    whole = {each(t, e).name: t.name for t in targets for e in range(t.experts or 0)}
    grouped = tuple(
        (shared, tuple(dict.fromkeys(whole.get(n, n) for n in names))) for shared, names in together.grouped
    )
    return replace(together, own=own, grouped=grouped)
