"""KappaTune: adapt the weights with the lowest condition number, whose singular values are the most alike.

    kappa(W) = s_max / (s_min + 1e-8)         of a stack of experts: the mean over them

PEFT's names, order and numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

import torch
from torch import nn
from tqdm.auto import tqdm

EXPERT_NAMES = (".gate_up_proj", ".down_proj", ".gate_proj", ".up_proj")


class KappaTuneSelector:
    """Condition numbers of a model's linear weights and stacks of experts, computed once, at the first question.

    max_dim_size_to_analyze: larger weights are left out. moe_param_suffixes: how names of stacks of experts end.
    """

    def __init__(
        self,
        model: nn.Module,
        max_dim_size_to_analyze: int = 16384,
        moe_param_suffixes: tuple[str, ...] | None = None,
        show_progress: bool = True,
    ):
        self.model, self.max_size = model, max_dim_size_to_analyze
        self.suffixes, self.show_progress = tuple(moe_param_suffixes or EXPERT_NAMES), show_progress

    def get_best_targets(self, top_p: float | None = None, num_modules: int | None = None,
                         threshold: float | None = None) -> list[str]:  # fmt: skip
        """Names for `target_modules`, best first: a number of them, a share, or all up to a condition number."""
        return best(self.modules, top_p, num_modules, threshold)

    def get_best_target_parameters(self, top_p: float | None = None, num_modules: int | None = None,
                                   threshold: float | None = None) -> list[str]:  # fmt: skip
        """The same for `target_parameters`."""
        return best(self.parameters, top_p, num_modules, threshold)

    @cached_property
    def modules(self) -> dict[str, float]:
        named = self.model.named_modules()
        return self.kappas("linear layers", [(n, m.weight) for n, m in named if isinstance(m, nn.Linear)])

    @cached_property
    def parameters(self) -> dict[str, float]:
        named = self.model.named_parameters()
        return self.kappas("experts", [(n, p) for n, p in named if n.endswith(self.suffixes) and p.dim() == 3])

    def kappas(self, what: str, weights: Iterable[tuple[str, torch.Tensor]]) -> dict[str, float]:
        found = {}
        for name, weight in tqdm(weights, desc=f"Condition numbers of {what}", disable=not self.show_progress):
            if not weight.is_floating_point():
                raise ValueError(
                    f"{name}: its weight is {weight.dtype}, packed by a quantisation; condition numbers need the numbers "
                    "themselves: take those of the model before it was quantised"
                )
            if max(weight.shape[-2:]) <= self.max_size:
                # a product of matrices at a time: all experts' values at once would be a copy of the stack
                values = [torch.linalg.svdvals(w.detach().float()) for w in weight.reshape(-1, *weight.shape[-2:])]
                each = [(s[0] / (s[-1] + 1e-8)).item() for s in values]
                found[name] = sum(each) / len(each)
        return found


def best(kappas: dict[str, float], top_p: float | None, number: int | None, threshold: float | None) -> list[str]:
    names = sorted(kappas, key=kappas.__getitem__)
    if number is not None:
        return names[:number]
    if top_p is not None:
        return names[: max(1, int(len(names) * top_p))]
    return [n for n in names if threshold is None or kappas[n] <= threshold]


def find_kappa_target_modules(
    model: nn.Module,
    top_p: float = 0.2,
    max_dim_size_to_analyze: int = 16384,
    moe_param_suffixes: tuple[str, ...] | None = None,
    show_progress: bool = True,
) -> dict[str, list[str] | None]:
    """Arguments for a config: the share `top_p` of linear modules and of stacks of experts; None where there are no experts."""
    selector = KappaTuneSelector(model, max_dim_size_to_analyze, moe_param_suffixes, show_progress)
    experts = selector.get_best_target_parameters(top_p)
    return {"target_modules": selector.get_best_targets(top_p), "target_parameters": experts or None}
