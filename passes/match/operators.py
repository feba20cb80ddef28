"""The operators that read a weight, as data: what a matcher recognises and how a factored update runs through them.

An additive update needs two applications of the target's own operator,

    d = second(first(x, A), B)        A: (experts?, r, in, *kernel),  B: (experts?, out, r / groups)

`first` is the operator itself with A in the weight's place. `second` is pointwise: the same operator for matrix products,
a 1x1 convolution with the target's groups, a linear map for embeddings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx
from torch.nn import functional as F

from ..core.nodes import input_of, overload_of


@dataclass(frozen=True)
class Operator:
    """kind: operator kind. x / weight: argument positions (weight: the possible ones). bias, groups: likewise, or None.

    channels: axis of the result that holds the output features. align: number of bytes of which rows of both operands
    must be a multiple; the rank is padded to it.
    second: (replay, h, B, bias, groups) -> d, where replay(h, B) is the operator at this site with other operands.
    """

    kind: str
    x: int
    weight: tuple[int, ...]
    second: Callable
    bias: int | None = None
    groups: int | None = None
    channels: int = -1
    align: int = 1


def same(replay, h, B, bias, groups):
    return replay(h, B, bias)


def linear(replay, h, B, bias, groups):
    return F.linear(h, B, bias)


def pointwise(dims: int):
    conv = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]

    def second(replay, h, B, bias, groups):
        return conv(h, B.reshape(*B.shape, *(1,) * dims), bias, groups=groups)

    return second


OPERATORS = {
    "aten::linear": Operator("linear", 0, (1,), same, bias=2),
    "aten::embedding": Operator("embedding", 1, (0,), linear),
    "aten::bmm": Operator("expert", 0, (0, 1), same),
    "aten::_grouped_mm": Operator("expert", 0, (1,), same, align=16),
    "transformers::grouped_mm_fallback": Operator("expert", 0, (1,), same),
    **{
        f"aten::conv{n}d{overload}": Operator(f"conv{n}d", 0, (1,), pointwise(n), bias=2, groups=6, channels=-1 - n)
        for n in (1, 2, 3)
        for overload in ("", ".padding")
    },
}

# Views and casts between a parameter and its operator that act alike on a factor put in the weight's place, as they leave the
# out and in axes whole: name -> (arguments, number of axes) -> whether it does. Splits and reshapes do not; their readers get
# the weight form.
SWAPS = {
    "aten::t": lambda args, dim: True,
    "aten::mT": lambda args, dim: True,
    "aten::transpose.int": lambda args, dim: {args[1] % dim, args[2] % dim} == {dim - 2, dim - 1},
    "aten::permute": lambda args, dim: [i % dim for i in args[1]] == [*range(dim - 2), dim - 1, dim - 2],
}
CHAIN = SWAPS | {
    "aten::index.Tensor": lambda args, dim: dim == 3 and len(args[1]) == 1,  # experts, chosen by id
    "aten::to.dtype": lambda args, dim: True,
}


def keeps_axes(node: fx.Node) -> bool:
    """True for a node of `CHAIN` that leaves the out and in axes of a weight whole."""
    rule = CHAIN.get(schema_name(node))
    return rule is not None and rule(node.args, input_of(node).meta["val"].dim())


def schema_name(node: fx.Node) -> str:
    """`aten::conv2d.padding` for an ATen call, "" for anything else."""
    return node.target.name() if isinstance(node.target, torch._ops.OpOverload) else ""


def full_args(node: fx.Node) -> list:
    """Positional arguments with the defaults that export dropped filled in from the schema."""
    arguments = overload_of(node)._schema.arguments
    values = list(node.args)
    for a in arguments[len(values) :]:
        if a.kwarg_only:
            break
        values.append(node.kwargs.get(a.name, a.default_value))
    return values
