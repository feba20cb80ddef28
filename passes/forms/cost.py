"""What a form of an adapter costs: counted floating-point operations and bytes moved, forward and backward.

Nothing is computed: the functions run on `meta` tensors of the sizes that were captured, and every operator that runs is
counted. A byte weighs as much as `BALANCE` operations, about what a processor computes while it fetches one, and an
operator as much as `LAUNCH`, what it computes while it is called.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.fx.experimental.symbolic_shapes import optimization_hint
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

BALANCE = 8
LAUNCH = 300_000


class Counter(TorchDispatchMode):
    """Adds up what runs under it."""

    def __init__(self):
        super().__init__()
        self.cost = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.is_view:
            return result
        tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)]
        self.cost += LAUNCH + BALANCE * sum(t.numel() * t.element_size() for t in tensors)
        if formula := flop_registry.get(func._overloadpacket):
            self.cost += formula(*args, **(kwargs or {}), out_val=result)
        return result


def cost(function: Callable, arguments: Sequence[torch.Tensor | None], trained: Sequence[bool]) -> float:
    """Of `function(*arguments)` and the gradients of its one result for those arguments that are trained."""
    with torch.inference_mode(False), torch.enable_grad():  # a model's first call may be in inference_mode
        on_meta = [None if a is None else meta(a, t) for a, t in zip(arguments, trained, strict=True)]
        with Counter() as counter:
            result = function(*on_meta)
            leaves = [t for t in on_meta if t is not None and t.requires_grad]
            if leaves:
                torch.autograd.grad(result, leaves, torch.empty_like(result), allow_unused=True)
    return counter.cost


def meta(fake: torch.Tensor, trained: bool) -> torch.Tensor:
    """A tensor without memory, of the sizes with which a graph was captured."""
    sizes, strides = ([optimization_hint(n) for n in numbers] for numbers in (fake.size(), fake.stride()))
    return torch.empty_strided(sizes, strides, dtype=fake.dtype, device="meta").requires_grad_(
        trained and fake.is_floating_point()
    )
