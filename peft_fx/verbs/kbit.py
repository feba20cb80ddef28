"""`prepare_kbit`: a graph over packed weights as QLoRA trains it. arXiv:2305.14314."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

from ..errors import GraphError
from ..methods.base import HALF
from ..passes.dynamo.outline import block_classes
from ..store.state import state_of
from ..store.tensors import ROOT
from .compile import outline


def prepare_kbit(tuned: fx.GraphModule) -> fx.GraphModule:
    """The graph cut into its repeated blocks, each of which is computed again in the backward of a training step.

    What lives between forward and backward is one input per block, as with PEFT's gradient checkpointing; numbers and gradients
    are those of `tuned`, dropout's draws too. Shares its tensors; swaps and switches reach it. `inline` undoes it.

    Norms, head and embeddings have to be float32, as `prepare_model_for_kbit_training(model)` makes them: casts are literals in
    a graph, so that comes before `capture`. Raises GraphError for others.
    """
    state_of(tuned, "prepare_kbit")
    halves = [n for n, p in tuned.named_parameters() if p.dtype in HALF and not n.startswith(f"{ROOT}.")]
    if halves:
        raise GraphError(
            f"{len(halves)} parameters are in half precision, {halves[0]} first: "
            "peft_fx.prepare_model_for_kbit_training(model) makes them float32, and the model is captured after it"
        )
    new = outline(tuned)
    for cls in block_classes(new):
        cls.forward = recomputed(cls.forward)
    return new


def recomputed(forward: Callable) -> Callable:
    """A forward that keeps its inputs alone for the backward, where there will be one."""

    @functools.wraps(forward)
    def run(module: nn.Module, *inputs: Any) -> Any:
        if module.training and torch.is_grad_enabled():
            return checkpoint(forward, module, *inputs, use_reentrant=False)
        return forward(module, *inputs)

    return run
