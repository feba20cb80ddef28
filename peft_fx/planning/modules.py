"""From a module tree to its `ModuleTable`: plain data, so that recipes can be planned without the model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..storage.packed import SUFFIX, Packed
from ..storage.twins import twin
from ..store.resident import Adapters
from ..target import ModuleRecord, ModuleTable
from .renamings import renamings

# The literals that change what a weight means or how its operator reads it.
ATTRIBUTES = (
    "groups", "stride", "padding", "dilation", "padding_mode", "output_padding", "padding_idx", "max_norm", "norm_type",
    "scale_grad_by_freq", "sparse", "is_transposed", "num_experts", "in_features", "out_features", "num_embeddings",
    "embedding_dim", "embed_dim", "num_heads", "batch_first", "_qkv_same_embed_dim",
)  # fmt: skip
ADAPTED = "_peft_fx_adapted"  # of a class that was made for adapted modules: the class that they had
LITERALS = (bool, int, float, str, type(None))


def module_table(model: nn.Module) -> ModuleTable:
    """Records every module of `model`, its own parameters and persistent buffers, aliases and tied parameters."""
    paths: dict[nn.Module, list[str]] = {}
    for path, module in own_modules(model):
        paths.setdefault(module, []).append(path)
    config = getattr(model, "config", None)
    return ModuleTable(
        records=tuple(record_of(module, found) for module, found in paths.items()),
        model_type=_get(config, "model_type"),
        name_or_path=getattr(model, "name_or_path", None) or _get(config, "_name_or_path") or None,
        model_class=own_class(model).__name__,
        output_head=_path_of(paths, _embeddings(model, "get_output_embeddings")),
        input_embedding=_path_of(paths, _embeddings(model, "get_input_embeddings")),
        tied=tied_parameters(paths),
        renamings=renamings(model),
    )


def record_of(module: nn.Module, paths: list[str]) -> ModuleRecord:
    """One module's record; `paths`: where it is reachable, the first one names it. Packed parameters count as the dense ones."""
    module = twin(module) or module
    packed = {n.removesuffix(SUFFIX): m for n, m in module._modules.items() if isinstance(m, Packed)}
    held = {n: p for n, p in module._parameters.items() if p is not None}
    buffers = {
        n: b for n, b in module._buffers.items() if b is not None and n not in module._non_persistent_buffers_set
    }
    return ModuleRecord(
        path=paths[0],
        type=own_class(module).__name__,
        bases=tuple(c.__name__ for c in own_class(module).__mro__ if c not in (nn.Module, object)),
        parameters={n: tuple(p.shape) for n, p in (packed | held).items()},
        buffers={n: tuple(b.shape) for n, b in buffers.items()},
        # without __getattr__, in which diffusers' models look into their config, with a warning
        attributes={
            n: _literal(v)
            for n in ATTRIBUTES
            if _is_literal(v := vars(module).get(n, getattr(own_class(module), n, _MISSING)))
        },
        aliases=tuple(paths[1:]),
    )


def own_modules(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(path, module), aliases as often as they occur; adapters that the model holds are none of its own."""
    yield prefix, model
    for name, child in getattr(model, "_modules", {}).items():
        if child is not None and not isinstance(child, (Adapters, Packed)):
            yield from own_modules(child, f"{prefix}.{name}" if prefix else name)


def own_class(module: nn.Module) -> type:
    """The module's class, adapters or none."""
    return getattr(type(module), ADAPTED, type(module))


def tied_parameters(paths: dict[nn.Module, list[str]]) -> tuple[tuple[str, ...], ...]:
    """Groups of parameter names that are one tensor, over distinct modules."""
    groups: dict[tuple, list[str]] = {}
    for module, found in paths.items():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                groups.setdefault(identity(parameter), []).append(f"{found[0]}.{name}" if found[0] else name)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)


def identity(tensor: torch.Tensor) -> tuple:
    """Equal for tensors that are the same memory seen the same way.

    The storage object stands for the memory: unlike its address it also tells meta and fake tensors apart.
    """
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tuple(tensor.shape), tensor.stride()


def _embeddings(model: nn.Module, getter: str) -> nn.Module | None:
    function = getattr(model, getter, None)
    try:
        return function() if callable(function) else None
    except (NotImplementedError, AttributeError):  # transformers models without a text embedding or head
        return None


def _path_of(paths: dict[nn.Module, list[str]], module: object) -> str | None:
    return paths[module][0] if isinstance(module, nn.Module) and module in paths else None


def _get(config: object, name: str) -> Any:
    return config.get(name) if isinstance(config, dict) else getattr(config, name, None)


_MISSING = object()


def _is_literal(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_literal, value))
    return isinstance(value, LITERALS)


def _literal(value: Any) -> Any:
    """JSON's version of a literal, so that a table equals its own round trip."""
    return [_literal(v) for v in value] if isinstance(value, (tuple, list)) else value
