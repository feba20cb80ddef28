"""Initialisers that several methods share: (empty tensor, base weight in canonical layout or None) -> None, in place."""

from __future__ import annotations

import math

from torch.nn import init


def zeros(tensor, W=None):
    init.zeros_(tensor)


def ones(tensor, W=None):
    init.ones_(tensor)


def constant(value, tensor, W=None):
    """For `partial(constant, value)`."""
    init.constant_(tensor, value)


def normal(tensor, W=None):
    init.normal_(tensor)


def scaled_normal(std, tensor, W=None):
    """For `partial(scaled_normal, std)`."""
    init.normal_(tensor, std=std)


def kaiming(tensor, W=None):
    """Uniform in +-1/sqrt(fan_in), fan_in = second axis times the receptive field."""
    init.kaiming_uniform_(tensor, a=math.sqrt(5))


def each(initialise, tensor, W=None):
    """For `partial(each, kaiming)`: every matrix of a stack on its own."""
    for matrix in tensor:
        initialise(matrix)


def uniform(bound, tensor, W=None):
    """For `partial(uniform, bound)`: uniform in +-bound."""
    init.uniform_(tensor, -bound, bound)


def copy_base(tensor, W):
    tensor.copy_(W)
