"""What a graph module carries: the submodule `peft_fx`, and how modules over the same tensors are made.

    gm.peft_fx.mode(train_value, eval_value)           literals that differ between train() and eval()
    gm.peft_fx.device()                                the device the captured literals mean
    gm.peft_fx.inputs(x, ...)                          checks what capture fixed of a call: constants, sizes
    gm.peft_fx.sharing                                 the lock between calls and swaps, for all graphs over the same tensors

A GraphModule subclass would be lost by the next pass; a submodule and `meta` are not.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
from torch import fx, nn

from ..errors import GraphError
from .inputs import FixedInputs
from .lazy import Forgetful, copy_graph
from .resident import Adapters
from .sharing import Shared, Sharing
from .state import State
from .tensors import PRESERVED, ROOT, store_of


class ByMode(nn.Module):
    """Chooses between a training and an evaluation literal, so that `train()` / `eval()` work on a captured graph.

    locked: why the graph has only one mode; leaving that mode then raises GraphError.
    """

    def __init__(self, training: bool, locked: str = ""):
        super().__init__()
        self.training, self.locked = training, locked

    def forward(self, train_value, eval_value):
        return train_value if self.training else eval_value

    def train(self, mode: bool = True):
        if self.locked and mode != self.training:
            wanted, has = ("train", "eval") if mode else ("eval", "train")
            raise GraphError(f"this graph has no {wanted} mode, it was captured in {has} mode only: {self.locked}")
        return super().train(mode)


class ByDevice(nn.Module):
    """The device on which the graph creates tensors: that of `anchor`, which `.to(device)` moves with the weights."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.register_buffer("anchor", torch.empty(0, device=device), persistent=False)

    def forward(self):
        return self.anchor.device


class Store(nn.Module):
    """Root of everything above. First child of its graph module, so that it can refuse before anything is converted."""

    def __init__(self, mode: ByMode, device: ByDevice):
        super().__init__()
        self.training = mode.training
        self.mode, self.device, self.inputs = mode, device, FixedInputs()
        self.adapters, self.gates, self.replaced = Adapters(), nn.Module(), nn.Module()
        self.sharing = Sharing()

    def train(self, mode: bool = True):
        self.mode.train(mode)  # first, since it may refuse
        return super().train(mode)

    def _apply(self, fn, recurse=True):
        if fn(torch.empty(0, dtype=torch.float32)).dtype != torch.float32:
            raise GraphError(
                "the dtype of a captured graph cannot be changed: casts such as x.float() are literals in it. "
                "Cast the model, e.g. model.to(torch.bfloat16), and capture it again"
            )
        return super()._apply(fn, recurse)


def set_graph(gm: fx.GraphModule, graph: fx.Graph) -> None:
    """Gives `gm` a graph without generating its code: whoever runs passes on it does that once, at the end."""
    gm._graph = graph
    graph.owning_module = gm


def build(modules: dict[str, nn.Module], parameters: dict, buffers: dict, graph: fx.Graph, state: State) -> Shared:
    """A GraphModule that owns the given root entries (objects, not copies); it runs `graph` once passes have run on it."""
    gm = Shared(nn.Module(), fx.Graph(), class_name="GraphModule")
    for name, module in modules.items():
        gm.add_module(name, module)
    for name, parameter in parameters.items():
        gm.register_parameter(name, parameter)
    for name, (buffer, persistent) in buffers.items():
        gm.register_buffer(name, buffer, persistent=persistent)
    set_graph(gm, graph)
    gm.meta[ROOT] = state
    gm.meta[PRESERVED] = {name: getattr(gm, name) for name in (ROOT, "_non_persistent_buffers_set")}
    gm.training = store_of(gm).mode.training
    return gm


def reading(gm: nn.Module) -> AbstractContextManager[None]:
    """Around what reads several numbers of a graph module that have to belong together: no swap comes between."""
    sharing = getattr(store_of(gm), "sharing", None)  # containers that another tool's pass rebuilt have none
    return nullcontext() if sharing is None else sharing.forward()


def derive(gm: fx.GraphModule, graph: fx.Graph, state: State) -> Shared:
    """A new GraphModule over the same tensors with its own module objects, graph, mode and state."""
    copies: dict[nn.Module, nn.Module] = {}
    modules = {name: shell(module, copies) for name, module in gm._modules.items() if module is not None}
    modules = {ROOT: modules.pop(ROOT), **modules}
    buffers = {n: (b, n not in gm._non_persistent_buffers_set) for n, b in gm._buffers.items()}
    if not hasattr(modules[ROOT], "sharing"):  # another tool's pass rebuilt the containers
        cast(Store, modules[ROOT]).sharing = Sharing()
    new = build(modules, dict(gm._parameters), buffers, graph, state)
    store_of(new).sharing.add(gm, new)
    return new


def shell(module: nn.Module, copies: dict[nn.Module, nn.Module] | None = None) -> nn.Module:
    """A module tree of new objects that hold the same tensors; sub-graphs of regions are copied too.

    copies: what has been copied already, so that a module under two names stays one module.
    """
    copies = {} if copies is None else copies
    if module in copies:
        return copies[module]
    if isinstance(module, fx.GraphModule):
        region = Forgetful(module, copy_graph(module.graph))
        region.training = module.training
        return region
    new = copies[module] = module.__new__(type(module))
    new.__dict__.update(module.__dict__)
    for kind in ("_parameters", "_buffers"):
        new.__dict__[kind] = dict(module.__dict__[kind])
    new.__dict__["_non_persistent_buffers_set"] = set(module._non_persistent_buffers_set)
    new.__dict__["_modules"] = {
        name: shell(child, copies) for name, child in module._modules.items() if child is not None
    }
    return new
