"""The keys of an adapter's file, as this model and PEFT call things today.

A key is PREFIX, a module's path, and what PEFT calls the tensor. Each rule is for one of these parts; a key of a module that the
model has is left alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeVar

import torch

from ..planning.plan import PREFIX, PREFIX_SHARED
from ..target import ModuleTable, Renaming

Tensors = dict[str, torch.Tensor]
T = TypeVar("T")

# methods that PEFT has renamed: old peft_type -> new one, and how the keys of its tensors ended and end
RENAMED = {"BONE": ("MISS", ".bone_block", ".miss_block")}


def of_method(tensors: Tensors, peft_type: str) -> Tensors:
    """The tensors of a file of that type, under the keys of the method that it is called today."""
    if peft_type not in RENAMED:
        return tensors
    _, old, new = RENAMED[peft_type]
    return {key.removesuffix(old) + new if key.endswith(old) else key: tensor for key, tensor in tensors.items()}


def mapped(tensors: Tensors, mapping: dict[str, str] | None) -> Tensors:
    """The tensors under keys in which, behind PEFT's prefix, the first regex of `mapping` that matches is replaced."""

    def new(path: str) -> str:
        return next((re.sub(old, to, path) for old, to in (mapping or {}).items() if re.search(old, path)), path)

    return with_paths(tensors, new) if mapping else tensors


def of_model(tensors: dict[str, T], table: ModuleTable) -> dict[str, T]:
    """The tensors under the names that the model's modules have now, where its checkpoints have former ones.

    Of a key's two names the one counts that leads deeper into the model.
    """

    def new(path: str) -> str:
        former = path
        for renaming in table.renamings:
            path = renamed(path, renaming)
        return path if depth(table, path) > depth(table, former) else former

    return with_paths(tensors, new) if table.renamings else tensors


def with_paths(tensors: dict[str, T], new: Callable[[str], str]) -> dict[str, T]:
    """The tensors under keys whose part behind the prefix is `new` of what it was."""
    prefixes = {key: next((p for p in (PREFIX, PREFIX_SHARED) if key.startswith(p)), "") for key in tensors}
    return {p + new(key[len(p) :]): tensors[key] for key, p in prefixes.items()}


def renamed(path: str, renaming: Renaming) -> str:
    scope = next((s for s in renaming.scopes if path.startswith(s)), None)
    return path if scope is None else scope + re.sub(renaming.pattern, renaming.to, path[len(scope) :], count=1)


def depth(table: ModuleTable, path: str) -> int:
    """How many parts of a path lead to a module of the model."""
    parts = path.split(".")
    return next((n for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in table), 0)
