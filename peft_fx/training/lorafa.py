"""LoRA-FA (Zhang et al. 2023, arXiv 2308.03303): A stays as it is, and B's gradient is what comes nearest to the whole one.

    g_B <- g_B (AAᵀ + 1e-8 I)⁺ / s²          then AdamW, with weight decay apart from the gradient

As PEFT's, whose product is in bfloat16, except that B is paired with the A of its own target: PEFT pairs neighbours in the
list of parameters, which a magnitude or bias shifts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from ..notices import warn
from ..store.state import state_of
from ..verbs.tensors import adapters_of, pairs_of, parameters_of, tensors_of
from .riemannian import damped_inverse

FORMS = ("linear", "embedding")


class LoraFAOptimizer(Optimizer):
    """AdamW. projected: parameter B -> (A, scale), for those whose gradient is projected first."""

    def __init__(self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-6,
                 weight_decay: float = 0.0, correct_bias: bool = True, *,
                 projected: dict[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]) -> None:  # fmt: skip
        wrong = {"lr": lr < 0, "betas": not all(0 <= b < 1 for b in betas), "eps": eps < 0}
        if any(wrong.values()):
            raise ValueError(f"out of range: {', '.join(n for n, is_wrong in wrong.items() if is_wrong)}")
        self.projected = projected
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "correct_bias": correct_bias}
        super().__init__(params, options)

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.update(parameter, group)
        return loss

    def update(self, parameter: torch.Tensor, group: dict) -> None:
        state, (beta1, beta2), lr = self.state[parameter], group["betas"], group["lr"]
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter))
        grad = parameter.grad
        if grad is not None and parameter in self.projected:
            grad = projected(grad, *self.projected[parameter])
        state["step"] += 1
        mean = state["exp_avg"].mul_(beta1).add_(grad, alpha=1 - beta1)
        square = state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        size = lr
        if group["correct_bias"]:
            size = lr * math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])
        parameter.addcdiv_(mean, square.sqrt().add_(group["eps"]), value=-size)
        if group["weight_decay"] > 0:
            parameter.add_(parameter, alpha=-lr * group["weight_decay"])


def projected(grad: torch.Tensor, A: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """B's gradient after the projection."""
    inverse = damped_inverse(A @ A.T, 1e-8)
    with torch.autocast(grad.device.type, torch.bfloat16):
        product = grad @ inverse
    return (product.float() / scale**2).to(product.dtype).to(grad.dtype)


def create_lorafa_optimizer(model: Any, r: int, lora_alpha: float, lr: float, weight_decay: float = 0.0,
                            use_rslora: bool | None = None) -> LoraFAOptimizer:  # fmt: skip
    """LoRA-FA for what trains in a PeftModel, a graph or a backend; freezes all A. What is no B of LoRA's gets plain AdamW.

    r, lora_alpha: not read, each target's own scale counts, as it is at the step. use_rslora is PEFT's to be dropped: it must
    agree with the configs. Raises ValueError for factors of convolutions and experts, whose projection is another.
    """
    state = state_of(adapters_of(model))
    if use_rslora is not None:
        others = [n for n in state.acting if getattr(state.recipe[n].config, "use_rslora", False) != use_rslora]
        if others:
            raise ValueError(
                f"use_rslora={use_rslora}, but the configs of {', '.join(others)} say otherwise: leave it out"
            )
        warn("use_rslora is read from the configs: leave it out", FutureWarning)
    pairs = pairs_of(parameters_of(model))
    scales = {t.path: t.tensor for t in tensors_of(model) if t.name == "scaling"}
    chosen = {}
    for A, B in pairs:
        target = A.placement.target
        if target.kind not in FORMS:
            raise ValueError(
                f"{target.name}: LoRA-FA projects gradients of linear weights and embeddings, not of {target.kind}"
            )
        A.tensor.requires_grad_(False)
        if not A.tensor.count_nonzero():
            warn(f"{target.name}: A is zero and stays so, B learns nothing")
        chosen[B.tensor] = A.tensor, scales[A.placement.state_name("scaling")]
    trained = [t.tensor for t in parameters_of(model) if t.tensor.requires_grad]
    return LoraFAOptimizer(trained, lr, weight_decay=weight_decay, projected=chosen)
