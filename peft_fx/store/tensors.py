"""Where the tensors of a graph module lie, and how they are looked up by name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from ..errors import GraphError
from ..storage.packed import SUFFIX, Packed

if TYPE_CHECKING:
    from .modules import Store

ROOT = "peft_fx"
ADAPTERS = f"{ROOT}.adapters"
REPLACED = f"{ROOT}.replaced"
GATES = f"{ROOT}.gates"
MODE = f"{ROOT}.mode"
DEVICE = f"{ROOT}.device"
INPUTS = f"{ROOT}.inputs"
PRESERVED = "_user_preserved_attributes"  # torch.fx: attributes named here survive deepcopy though no node reads them


def store_of(gm: nn.Module) -> Store:
    """`gm.peft_fx`, by its type."""
    return cast("Store", getattr(gm, ROOT))


def gate_name(adapter: str) -> str:
    """Where the gate of an adapter is: in a module of its own, so that it keeps its holder under another name."""
    return f"{GATES}.{adapter}.open"


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
        module = module.get_submodule(part)
    return module, leaf


def get_tensor(root: nn.Module, name: str) -> torch.Tensor | None:
    """The parameter or buffer called `name`, or None."""
    *path, leaf = name.split(".")
    module = root
    for part in path:
        child = module._modules.get(part)
        if child is None:
            return None
        module = child
    return module._parameters.get(leaf) if leaf in module._parameters else module._buffers.get(leaf)


def tensor_of(root: nn.Module, name: str) -> torch.Tensor:
    """The parameter or buffer called `name`, which is there."""
    tensor = get_tensor(root, name)
    if tensor is None:
        raise GraphError(f"the graph module has no {name!r}")
    return tensor


def packed_of(root: nn.Module, name: str) -> Packed | None:
    """What keeps the weight called `name`, if it is packed."""
    path, _, leaf = name.rpartition(".")
    module: nn.Module | None = root
    for part in (*(path.split(".") if path else ()), leaf + SUFFIX):
        module = None if module is None else module._modules.get(part)
    return module if isinstance(module, Packed) else None


def kept_of(root: nn.Module, name: str) -> torch.Tensor | Packed:
    """The weight called `name` as it is kept: of both kinds one may ask shape, dtype and device, those of the dense one."""
    packed = packed_of(root, name)
    return tensor_of(root, name) if packed is None else packed


def find_kept(root: nn.Module, name: str) -> torch.Tensor | Packed | None:
    """The same, or None."""
    packed = packed_of(root, name)
    return get_tensor(root, name) if packed is None else packed


def weight_of(root: nn.Module, name: str) -> torch.Tensor:
    """The numbers of the weight called `name`: those of a packed one are made for whoever asks."""
    kept = kept_of(root, name)
    return kept.dense() if isinstance(kept, Packed) else kept


def copy_all(writes: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Tensor <- value for all of them, or for none."""
    tensors, values = map(list, zip(*writes, strict=True)) if (writes := list(writes)) else ([], [])
    before = [tensor.detach().clone() for tensor in tensors]
    try:
        torch._foreach_copy_(tensors, values)
    except BaseException:
        torch._foreach_copy_(tensors, before)
        raise


def set_tensor(root: nn.Module, name: str, tensor: torch.Tensor, persistent: bool = True) -> None:
    """Registers `tensor` under `name`: a Parameter as parameter, anything else (and non-persistent) as buffer."""
    owner, leaf = cleared(root, name)
    if isinstance(tensor, nn.Parameter) and persistent:
        owner.register_parameter(leaf, tensor)
    else:
        owner.register_buffer(leaf, tensor, persistent=persistent)


def set_packed(root: nn.Module, name: str, packed: Packed) -> None:
    """Keeps the weight called `name` as `packed`."""
    owner, leaf = cleared(root, name)
    owner._modules[leaf + SUFFIX] = packed


def set_kept(root: nn.Module, name: str, kept: torch.Tensor | Packed, persistent: bool = True) -> None:
    """Keeps the weight called `name` as this tensor, or as a module of its own over these packed numbers."""
    if isinstance(kept, Packed):
        set_packed(root, name, kept.again(persistent=persistent))
    else:
        set_tensor(root, name, kept, persistent)


def cleared(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module for the dotted `name`, which holds nothing under its last component, and that."""
    owner, leaf = owner_of(root, name, create=True)
    owner._parameters.pop(leaf, None)
    owner._buffers.pop(leaf, None)
    owner._modules.pop(leaf + SUFFIX, None)
    return owner, leaf
