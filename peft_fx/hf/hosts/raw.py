"""Forwards that run as adapted graphs read the base's tensors, whatever stands for these to everybody else."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ...planning.modules import own_class

STATE = threading.local()
PLAIN = "_peft_fx_plain"  # where an adapted module has itself as it was, for who asks


@contextmanager
def raw() -> Iterator[None]:
    """Inside the block, in this thread, an attribute of an adapted module is its own tensor."""
    before = is_raw()
    STATE.raw = True
    try:
        yield
    finally:
        STATE.raw = before


@torch._dynamo.assume_constant_result  # compiled for a host's own run, or for none
def is_raw() -> bool:
    return getattr(STATE, "raw", False)


def raw_forward(module: nn.Module) -> Callable:
    """The forward of the module's own class, on its own tensors."""
    own: type[nn.Module] = own_class(module)
    if own is type(module):
        return own.forward.__get__(module)
    twin = object.__new__(own)
    twin.__dict__ = module.__dict__
    return own.forward.__get__(twin)
