"""Where the tensors of a graph module lie, and how they are looked up by name."""

from __future__ import annotations

import torch
from torch import nn

from ..errors import GraphError

ROOT = "peft_fx"
ADAPTERS = f"{ROOT}.adapters"
REPLACED = f"{ROOT}.replaced"
GATES = f"{ROOT}.gates"
MODE = f"{ROOT}.mode"
DEVICE = f"{ROOT}.device"
INPUTS = f"{ROOT}.inputs"
PRESERVED = "_user_preserved_attributes"  # torch.fx: attributes named here survive deepcopy though no node reads them


def owner_of(root: nn.Module, name: str, create: bool = False) -> tuple[nn.Module, str]:
    """The module that holds the dotted `name`, and the last component; `create` adds missing containers."""
    *path, leaf = name.split(".")
    module = root
    for part in path:
        if part not in module._modules:
            if not create:
                raise GraphError(f"the graph module has no {name!r}")
            child = nn.Module()
            child.training = root.training
            module.add_module(part, child)
        module = module._modules[part]
    return module, leaf


def get_tensor(root: nn.Module, name: str) -> torch.Tensor | None:
    """The parameter or buffer called `name`, or None."""
    *path, leaf = name.split(".")
    module = root
    for part in path:
        module = module._modules.get(part)
        if module is None:
            return None
    return module._parameters.get(leaf) if leaf in module._parameters else module._buffers.get(leaf)


def set_tensor(root: nn.Module, name: str, tensor: torch.Tensor, persistent: bool = True) -> None:
    """Registers `tensor` under `name`: a Parameter as parameter, anything else (and non-persistent) as buffer."""
    owner, leaf = owner_of(root, name, create=True)
    owner._parameters.pop(leaf, None)
    owner._buffers.pop(leaf, None)
    if isinstance(tensor, nn.Parameter) and persistent:
        owner.register_parameter(leaf, tensor)
    else:
        owner.register_buffer(leaf, tensor, persistent=persistent)
