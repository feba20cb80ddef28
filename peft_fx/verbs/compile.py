"""`compile`: the repeated blocks of a graph as modules of one class each, and each class compiled once; `inline` undoes it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from ..engine.derive import derived
from ..passes.core.base import run
from ..passes.dynamo.outline import Outline, block_classes
from ..passes.dynamo.products import options_with
from ..store.lazy import copy_graph
from ..store.modules import derive
from ..store.state import state_of


def outline(tuned: fx.GraphModule) -> fx.GraphModule:
    """The graph cut into its repeated blocks, over the same tensors: calls, names and numbers stay, layers become modules.

    Each block is an `nn.Module` in the place of the module it was, with that module's parameters: what FSDP wraps, what is
    recomputed, what is compiled once. Blocks that compute the same share one class.
    """
    state = state_of(tuned, "outline")
    new = derive(tuned, copy_graph(tuned.graph), state)
    reports = run([Outline()], new)
    new.meta["peft_fx"] = state.update(reports=reports)
    return new


def compile(
    tuned: fx.GraphModule,
    *,
    mode: str | None = None,
    fullgraph: bool = True,
    dynamic: bool | None = True,
    options: dict | None = None,
    backend: str | Callable = "inductor",
) -> fx.GraphModule:
    """The graph with its blocks compiled, each class of equal ones once: a cold start that does not grow with depth.

    mode, fullgraph, dynamic, options, backend: as for `torch.compile`; here mode and options go together. Inductor's float32
    products run through oneDNN where the processor is AMD's (`peft_fx.kernels.product`). The result is called like `tuned`,
    shares its tensors, and takes hotswaps and switches with 0 recompiles. In training the first block usually compiles
    apart: its input needs no gradient. What cannot be cut is compiled as a whole.
    """
    state_of(tuned, "compile")
    new = outline(tuned)
    chosen = {"options": options_with(mode, options)} if backend == "inductor" else {"mode": mode, "options": options}
    for cls in block_classes(new):
        cls.forward = torch.compile(cls.forward, fullgraph=fullgraph, dynamic=dynamic, backend=backend, **chosen)
    return new


def inline(outlined: fx.GraphModule) -> fx.GraphModule:
    """The flat graph of what `outline` or `compile` cut, over the same tensors."""
    return derived(outlined, state_of(outlined, "inline"))
