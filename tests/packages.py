"""Layers with the class names of packages that are not installed here."""

import sys
from types import ModuleType

from torch import nn


def layer(monkeypatch, module, classes, tensors=None, **attributes):
    """A module of the last of `classes`, each the base of the next, that says it comes from `module`; tensors are its buffers."""
    package = module.split(".")[0]
    if package not in sys.modules:
        monkeypatch.setitem(sys.modules, package, ModuleType(package))
    kind = nn.Module
    for name in classes:
        kind = type(name, (kind,), {"__module__": module})
    made = kind()
    for name, tensor in (tensors or {}).items():
        made.register_buffer(name, tensor)
    for name, value in attributes.items():
        setattr(made, name, value)
    return made
