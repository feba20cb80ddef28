"""Initialisers that several methods share: (empty tensor, base weight in canonical layout or None) -> None, in place."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch.nn import init


def drawn(draw, tensor, *options, **more):
    """`draw` as PEFT does it, on the CPU in torch's default dtype: there the same seed gives the same numbers everywhere."""
    numbers = torch.empty(tensor.shape, device="cpu")
    draw(numbers, *options, **more)
    tensor.copy_(numbers)


def zeros(tensor, W=None):
    init.zeros_(tensor)


def ones(tensor, W=None):
    init.ones_(tensor)


def constant(value, tensor, W=None):
    """For `partial(constant, value)`."""
    init.constant_(tensor, value)


def number_of(initialiser):
    """The number that a `partial(constant, value)` writes everywhere, whatever the base weight; None for any other."""
    if getattr(initialiser, "func", None) in (drawn_after, drawn_over):
        return number_of(initialiser.args[-1])
    return initialiser.args[0] if getattr(initialiser, "func", None) is constant else None


def normal(tensor, W=None):
    drawn(init.normal_, tensor)


def scaled_normal(std, tensor, W=None):
    """For `partial(scaled_normal, std)`."""
    drawn(init.normal_, tensor, std=std)


def near(value, config):
    """`value`; with init_weights=False normal noise around it."""
    return partial(constant, value) if config.init_weights else partial(around, value, 0.1)


def around(value, std, tensor, W=None):
    """For `partial(around, value, std)`."""
    drawn(init.normal_, tensor, value, std)


def near_eye(config):
    """The identity matrix; with init_weights=False normal noise around it."""
    return eye if config.init_weights else eye_and_noise


def eye(tensor, W=None):
    init.eye_(tensor)


def eye_and_noise(tensor, W=None):
    drawn(init.normal_, tensor, std=0.1)
    tensor.diagonal().add_(1.0)


def kaiming(tensor, W=None):
    """Uniform in +-1/sqrt(fan_in), fan_in = second axis times the receptive field; a vector is one row."""
    drawn(init.kaiming_uniform_, tensor if tensor.dim() > 1 else tensor.unsqueeze(0), a=math.sqrt(5))


def drawn_after(draw, shapes, init, tensor, W=None):
    """For `partial(drawn_after, draw, shapes, init)`: `init` after numbers that are drawn for nothing, as PEFT draws them.

    The same seed then gives the same adapter, and leaves the generator in the same state.
    """
    for shape in shapes:
        draw(tensor.new_empty(shape))
    init(tensor, W)


def drawn_over(draw, init, tensor, W=None):
    """For `partial(drawn_over, draw, init)`: `init` after `draw` filled the tensor, as it is when PEFT makes it."""
    draw(tensor)
    init(tensor, W)


def orthogonal(r: int):
    """Initialisers of A (r, in) and B (out, r): noise times the odd and the even rows of one orthogonal matrix, drawn with A.

    Where B is drawn without an A, it has a matrix of its own.
    """
    drawn: list[torch.Tensor] = []  # the matrix of the last A

    def matrix():
        return torch.linalg.qr(torch.randn(r, r, device="cpu"))[0]

    def start_A(tensor, W=None):
        drawn[:] = [matrix()]
        tensor.copy_(torch.randn(tensor.shape[1], r // 2, device="cpu").mm(drawn[0][0::2]).T / 10.0)

    def start_B(tensor, W=None):
        rows = (drawn[0] if drawn else matrix())[1::2]
        tensor.copy_(torch.randn(r // 2, tensor.shape[0], device="cpu").T.mm(rows) / 10.0)

    return start_A, start_B


def kaiming_blocks(tensor, W=None):
    """(blocks, fan_in, r): each block is the transpose of a `kaiming` matrix."""
    for block in tensor:
        kaiming(block.mT)


def uniform(bound, tensor, W=None):
    """For `partial(uniform, bound)`: uniform in +-bound."""
    drawn(init.uniform_, tensor, -bound, bound)


def integers(below, tensor, W=None):
    """For `partial(integers, below)`: from 0 to less than `below`, equally often."""
    tensor.random_(0, below)


def copy_base(tensor, W):
    tensor.copy_(W)
