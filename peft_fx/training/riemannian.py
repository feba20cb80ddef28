"""Riemannian preconditioning for LoRA (Zhang and Pilanci 2024, arXiv 2402.02347): gradients in the metric of the product B A.

    g_A <- (BᵀB + reg I)⁺ g_A          g_B <- g_B (AAᵀ + reg I)⁺          r x r, in float32 or wider

Of linear weights only, as in PEFT.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from ..verbs.tensors import pairs_of, parameters_of


def create_riemannian_optimizer(model: Any, optimizer_cls: type[Optimizer], *, lr: float, reg: float = 1e-2,
                                **options: Any) -> Optimizer:  # fmt: skip
    """An optimiser of a subclass of that class for what trains in a PeftModel, a graph or a backend.

    Before each step it replaces the gradients of both factors of linear weights; others it leaves alone. reg keeps the
    inverses finite. Raises ValueError where there are no such factors, and for optimisers that compute losses in their steps.
    """
    if not (isinstance(optimizer_cls, type) and issubclass(optimizer_cls, Optimizer)):
        raise TypeError(f"optimizer_cls: expected a subclass of torch.optim.Optimizer, got {optimizer_cls!r}")
    closure = inspect.signature(optimizer_cls.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"{optimizer_cls.__name__} computes losses in its steps: take one that does not, such as AdamW"
        )
    owned = [t for t in parameters_of(model) if t.tensor.requires_grad]
    pairs = [(A.tensor, B.tensor) for A, B in pairs_of(owned) if A.placement.target.kind == "linear"]
    if not pairs:
        raise ValueError("no linear weight of this model has two factors of LoRA's that train: nothing to precondition")

    class Riemannian(optimizer_cls):  # type: ignore[misc, valid-type]  # the caller's
        def step(self, closure: Callable | None = None) -> Any:
            if closure is not None:
                raise ValueError("a closure would put its own gradients in place of the preconditioned ones: call backward "
                                 "before step()")  # fmt: skip
            precondition(pairs, reg)
            return super().step()

    return Riemannian([t.tensor for t in owned], lr=lr, **options)


@torch.no_grad()
def precondition(pairs: list[tuple[torch.Tensor, torch.Tensor]], reg: float) -> None:
    """Replaces the gradients, in place."""
    for A, B in pairs:
        a, b = (x.detach().to(torch.promote_types(x.dtype, torch.float32)) for x in (A, B))
        if A.grad is not None:
            A.grad.copy_(damped_inverse(b.T @ b, reg) @ A.grad.to(a.dtype))
        if B.grad is not None:
            B.grad.copy_(B.grad.to(b.dtype) @ damped_inverse(a @ a.T, reg))


def damped_inverse(gram: torch.Tensor, damping: float) -> torch.Tensor:
    """(M + damping I)⁺"""
    return torch.linalg.pinv(gram + damping * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
