"""Fake tensors: the metadata (`val`) of nodes that a pass adds, under the mode in which the graph was captured."""

from __future__ import annotations

import torch
from torch import fx
from torch._subclasses import FakeTensor

from ...errors import GraphError
from .base import regions


def fake_mode_of(gm: fx.GraphModule):
    """The fake mode under which the graph was captured."""
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, FakeTensor):
            return value.fake_mode
    for region in regions(gm):
        return fake_mode_of(region)
    raise GraphError("the graph has no tensor metadata: capture it with peft_fx.capture")


def fake_of(fake_mode, tensor: torch.Tensor) -> torch.Tensor:
    """A fake of `tensor` with static shape; an object of its own, since programs tell inputs apart by identity."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout != torch.strided:
        return fake_mode.from_tensor(tensor, static_shapes=True)
    # made directly, some thirty times faster than converting: there is one for each tensor of an adapter
    meta = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")
    return FakeTensor(fake_mode, meta, tensor.device).requires_grad_(tensor.requires_grad)
