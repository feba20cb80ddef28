"""AdaLoRA's rank budget (Zhang et al. 2023, arXiv 2303.10512): components of little importance are set to zero.

    loss.backward(); optimizer.step(); allocator.update_and_allocate(step); optimizer.zero_grad()

Per number p: I <- b1 I + (1 - b1) |p dp|, then U <- b2 U + (1 - b2) | |p dp| - I |. A component's importance is I U of its E
plus the means of I U over its row of A and column of B. The budget falls with the cube of the steps left, from all
components to target_r per matrix; what does not fit is zeroed, and may grow again until the last tfinal steps.
A stack of experts counts as one matrix: its experts keep the same components, by their mean importance.
As PEFT's, except that a budget with nothing to remove removes nothing (there: an error).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import fx

from ..atomic import StrPath
from ..config import AdapterConfig
from ..errors import RecipeError
from ..files.write import file_config, write_adapter
from ..planning.plan import make_plan
from ..store.state import state_of
from ..store.tensors import ADAPTERS, tensor_of

if TYPE_CHECKING:
    from ..methods.adalora import AdaLoraConfig

COMPONENTS = {"lora_A": -2, "lora_E": -2, "lora_B": -1}  # tensor -> the axis of its components


class RankAllocator:
    """Budget and importance of one resident AdaLoRA adapter.

    rank_pattern: "<module>.lora_E" -> a boolean per component, once there is a mask.
    """

    def __init__(self, tuned: fx.GraphModule, adapter: str = "default"):
        self.tuned, self.adapter, self.state = tuned, adapter, state_of(tuned, "RankAllocator")
        self.config = cast("AdaLoraConfig", self.state.recipe[adapter].config)
        if self.config.peft_type != "ADALORA":
            raise RecipeError(f"adapter {adapter!r} is {self.config.peft_type}; only AdaLoRA has a rank budget")
        self.last = (
            cast(int, self.config.total_step) - self.config.tfinal
        )  # step after which nothing is chosen any more
        self.tensors = factors(tuned, adapter)
        self.first_budget = sum(t["lora_A"].shape[-2] for t in self.tensors.values())
        self.last_budget = self.config.target_r * len(self.tensors)
        self.importance: dict[tuple[str, str], tuple[torch.Tensor, torch.Tensor]] = {}
        self.rank_pattern: dict[str, list[bool]] | None = None

    def budget(self, step: int) -> int:
        """Components that may stay at `step`."""
        c = self.config
        if step <= c.tinit:
            return self.first_budget
        if step > self.last:
            return self.last_budget
        left = 1 - (step - c.tinit) / (self.last - c.tinit)
        return int((self.first_budget - self.last_budget) * left**3 + self.last_budget)

    def update_and_allocate(self, step: int) -> None:
        """Call once per training step, after `backward` and before `zero_grad`."""
        c, last = self.config, self.last
        if step < last:
            self.update_importance()
        if step == last or (c.tinit < step < last and step % c.deltaT == 0):
            self.choose(self.budget(step))
        elif step > last:
            self.zero()

    def update_importance(self) -> None:
        for path, tensors in self.tensors.items():
            for name, p in tensors.items():
                if p.grad is None:
                    raise RecipeError(
                        f"{path}.{name} has no gradient: call update_and_allocate between backward and zero_grad"
                    )
                now = (p * p.grad).abs().detach()
                mean, spread = self.importance.get((path, name), (torch.zeros_like(now),) * 2)
                mean = self.config.beta1 * mean + (1 - self.config.beta1) * now
                spread = self.config.beta2 * spread + (1 - self.config.beta2) * (now - mean).abs()
                self.importance[path, name] = mean, spread

    def choose(self, budget: int) -> None:
        """Sets `rank_pattern` to the components above the one that just does not fit into the budget."""
        scores = {path: self.score(path) for path in self.tensors}
        surplus, everyone = self.first_budget - budget, torch.cat(list(scores.values()))
        threshold = everyone.kthvalue(surplus).values if surplus > 0 else everyone.new_tensor(-1.0)
        self.rank_pattern = {f"{path}.lora_E": (score > threshold).tolist() for path, score in scores.items()}
        self.zero()

    def score(self, path: str) -> torch.Tensor:
        product = {name: mean * spread for (p, name), (mean, spread) in self.importance.items() if p == path}
        scores = product["lora_E"].squeeze(-1) + product["lora_A"].mean(-1) + product["lora_B"].mean(-2)
        return scores.reshape(-1, scores.shape[-1]).mean(0)

    def zero(self) -> None:
        """Sets E of every component that is not kept to zero."""
        pattern = self.rank_pattern or {}
        for path, tensors in self.tensors.items():
            kept = torch.tensor(pattern[f"{path}.lora_E"], device=tensors["lora_E"].device)
            tensors["lora_E"].data.masked_fill_(~kept.unsqueeze(1), 0.0)

    def save(self, folder: StrPath) -> Path:
        """Writes the adapter as `save_adapter` does, with the kept components only."""
        return write_adapter(Path(folder), *self.files())

    def files(self, tuned: fx.GraphModule | None = None) -> tuple[AdapterConfig, dict[str, torch.Tensor]]:
        """What `save` writes. tuned: a graph module with other numbers for the same adapter."""
        config = replace(self.config, rank_pattern=self.rank_pattern)
        plan = make_plan(self.state.table, self.adapter, config)
        found = {}
        for p in plan.placements:
            for name, key, _ in p.saved():
                found[key] = tensor_of(tuned or self.tuned, f"{ADAPTERS}.{p.resolve(name).name}").detach()
                if p.method == "ADALORA" and self.rank_pattern:
                    kept = torch.tensor(self.rank_pattern[f"{p.target.file_path}.lora_E"], device=found[key].device)
                    found[key] = found[key].index_select(COMPONENTS[name], kept.nonzero().flatten())
        return file_config(config, plan), found


def orthogonality(tuned: fx.GraphModule, adapter: str = "default") -> torch.Tensor:
    """orth_reg_weight * the mean over all factors of |A Aᵀ - I| and |Bᵀ B - I|: add it to the loss."""
    grams = []
    for tensors in factors(tuned, adapter).values():
        A, B = tensors["lora_A"], tensors["lora_B"]
        grams += [A @ A.mT, B.mT @ B]
    distances = [torch.linalg.matrix_norm(g - torch.diag_embed(g.new_ones(g.shape[-1]))).flatten() for g in grams]
    config = cast("AdaLoraConfig", state_of(tuned).recipe[adapter].config)
    return config.orth_reg_weight * torch.cat(distances).mean()


def factors(tuned: fx.GraphModule, adapter: str) -> dict[str, dict[str, torch.Tensor]]:
    """Module path in PEFT's files -> the adapter's A, E and B there."""
    return {
        p.target.file_path: {n: tensor_of(tuned, f"{ADAPTERS}.{p.resolve(n).name}") for n in COMPONENTS}
        for p in state_of(tuned, "AdaLoRA").recipe[adapter].placements
        if p.method == "ADALORA"
    }
