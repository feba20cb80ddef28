"""An adapted module as it was: of its own class, over the same tensors, called without adapters."""

from __future__ import annotations

from torch import nn

from ...planning.modules import own_class
from ..hosts.raw import PLAIN
from .containers import PLACES, written
from .layer import ATTRIBUTE

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
        module.__dict__[PLAIN] = found.__dict__[PLAIN] = found
    found.__dict__.update({k: v for k, v in module.__dict__.items() if k not in OURS})
    return found


def with_tensors(module: nn.Module, tensors: dict[str, tuple], path: str = "") -> nn.Module:
    """A module of the same class and parts, with some other tensors. tensors: name -> one, and the place that it has."""
    new: nn.Module = object.__new__(written(own_class(module)))
    new.__dict__.update({k: v for k, v in module.__dict__.items() if k not in OURS})
    here = {
        leaf: tensors[path + leaf]
        for k in ("_parameters", "_buffers")
        for leaf in module.__dict__[k]
        if path + leaf in tensors
    }
    for kind in ("_parameters", "_buffers"):
        kept = module.__dict__[kind]
        new.__dict__[kind] = {leaf: here[leaf][0] if leaf in here else kept[leaf] for leaf in kept}
    parts = module._modules.items()
    new.__dict__["_modules"] = {n: m and with_tensors(m, tensors, f"{path}{n}.") for n, m in parts}
    new.__dict__[PLACES] = {leaf: place for leaf, (_, place) in here.items()}
    return new
