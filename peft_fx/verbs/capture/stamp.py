"""Trace equal layers once: the model is traced with the first three of each list of equal layers, the rest is stamped out.

A layer is only stamped where it provably is the one that was traced: its module has the class, attributes and shapes of the
others, the second and third layer's traces are equal node by node, layers hand one value on, and the stamped graph is the
model's computation by structure (`proof.py`). Whatever does not hold is the reason for tracing all layers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

from ...errors import GraphError, RecipeError
from ...passes.capture.replicate import ReplicateLayers
from ...passes.core.base import Report, run
from ...passes.dynamo.outline import Part, key_of, list_paths
from ...storage.twins import SOURCE

TRACED = 3
LEAST = 5  # with fewer layers stamping saves nothing


def equal_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Path -> list of at least `LEAST` layers that differ in their tensors' values and their index alone; not inside another."""
    found: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in found)
        long = isinstance(module, nn.ModuleList) and len(module) >= LEAST and not inside
        if long and all(equal(module[0], layer, 0, i) for i, layer in enumerate(module)):
            found[path] = module
    return found


def equal(a: nn.Module, b: nn.Module, index_a: int, index_b: int) -> bool:
    """Whether two modules compute the same of their tensors, as far as classes, attributes and shapes tell."""
    if type(a) is not type(b) or a._modules.keys() != b._modules.keys():
        return False
    for kind in ("_parameters", "_buffers"):
        ours, others = getattr(a, kind), getattr(b, kind)
        if ours.keys() != others.keys() or any(described(ours[n]) != described(others[n]) for n in ours):
            return False
    private = {*nn.Module().__dict__, SOURCE}
    ours, others = ({k: v for k, v in m.__dict__.items() if k not in private} for m in (a, b))
    if ours.keys() != others.keys() or any(m._forward_hooks or m._forward_pre_hooks for m in (a, b)):
        return False
    return all(same(ours[k], others[k], index_a, index_b) for k in ours) and all(
        x is y or (x is not None and y is not None and equal(x, y, index_a, index_b))
        for x, y in zip(a._modules.values(), b._modules.values(), strict=True)
    )


def described(tensor: torch.Tensor | None) -> Any:
    return tensor is None or (tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad, type(tensor))


def same(a: object, b: object, index_a: int, index_b: int) -> bool:
    """Whether two attributes are the same: a layer's own index counts as equal, anything that cannot be compared does not."""
    if a is b or (type(a) is type(b) is int and (a, b) == (index_a, index_b)):
        return True
    if isinstance(a, (bool, int, float, str, tuple, type(None))):
        return type(a) is type(b) and a == b
    return isinstance(a, nn.Module) and isinstance(b, nn.Module) and equal(a, b, index_a, index_b)


@contextlib.contextmanager
def shortened(model: nn.Module, lists: dict[str, nn.ModuleList]) -> Iterator[None]:
    """The model with the first layers of each list only."""
    places = {path: model.get_submodule(path.rpartition(".")[0]) for path in lists}
    try:
        for path, layers in lists.items():
            places[path]._modules[path.rpartition(".")[2]] = nn.ModuleList(list(layers)[:TRACED])
        yield
    finally:
        for path, layers in lists.items():
            places[path]._modules[path.rpartition(".")[2]] = layers


def stamp_layers(gm: fx.GraphModule, lists: dict[str, nn.ModuleList]) -> tuple[Report, ...]:
    """Makes the graph of a shortened model, over the whole model's modules, that of the whole. Raises GraphError if it cannot."""
    reports: tuple[Report, ...] = ()
    for path, layers in lists.items():
        second, third = (part_of(gm, f"{path}.{i}") for i in (1, 2))
        if key_of(gm, second) != key_of(gm, third):
            raise GraphError(f"the second and third of {path} are traced differently")
        try:
            reports += run([ReplicateLayers(path, (0, *(1 for _ in range(len(layers) - 2)), 2))], gm)
        except RecipeError as error:
            raise GraphError(str(error).removeprefix("layer_replication: ")) from error
    return reports


def part_of(gm: fx.GraphModule, path: str) -> Part:
    """The nodes of one layer, without those that only compute sizes."""
    return Part(path, tuple(n for n in gm.graph.nodes if path in list_paths(n)))
