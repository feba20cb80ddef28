"""An adapted module as it was: of its own class, over the same tensors, called without adapters."""

from __future__ import annotations

from torch import nn

from ...planning.modules import own_class
from .layer import ATTRIBUTE

PLAIN = "_peft_fx_plain"  # where an adapted module keeps it
OURS = (
    "forward",
    "_old_forward",
    "_hf_hook",
    ATTRIBUTE,
    PLAIN,
)  # what makes a module an adapted one, or moves its tensors


def plain(module: nn.Module) -> nn.Module:
    """The same object at every look, with what the module has now; its parameters, buffers and parts are the module's."""
    found = module.__dict__.get(PLAIN)
    if found is None:
        found = object.__new__(own_class(module))
        module.__dict__[PLAIN] = found
    found.__dict__.update({k: v for k, v in module.__dict__.items() if k not in OURS})
    return found
