"""AdaMSS's adaptive subspace allocation (ASA): subspaces of little importance stop learning.

    loss.backward(); optimizer.step(); allocator.update_and_allocate(step); optimizer.zero_grad()

From init_warmup to final_warmup, per number p: U <- b2 U + (1 - b2) | |p dp| - I |, then I <- b1 I + (1 - b1) |p dp|. A
subspace's importance is the mean of I U over its A plus that over its B. At every step that mask_interval divides, the T most
important of those that still learn go on, and I and U start anew; T falls from all to asa_target_subspaces with a power of
the steps left. The others keep their numbers, so that outputs do not change: they get no gradient, and what momentum or
weight decay does to them is taken back.
As PEFT's, except that T subspaces go on where it keeps T - 1. PEFT drops `requires_grad`, which would recompile a graph.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import fx

from ..errors import RecipeError
from ..planning.plan import Placement
from ..store.state import state_of
from ..store.tensors import ADAPTERS, tensor_of

if TYPE_CHECKING:
    from ..methods.adamss import AdamssConfig

NAMES = ("adamss_A", "adamss_B", "rows", "components")


@dataclass
class Subspaces:
    """Those of one target, a stack of experts included.

    learning: (..., k), whether each still learns. masks: the same for every row of A and of B, seen by their gradients.
    kept: A and B when the last ones stopped. importance: I and U of A and of B, None since the last choice.
    """

    path: str
    A: torch.Tensor
    B: torch.Tensor
    rows: torch.Tensor
    components: torch.Tensor
    learning: torch.Tensor = field(init=False)
    masks: tuple[torch.Tensor, ...] = field(init=False)
    kept: tuple[torch.Tensor, ...] = ()
    importance: list[tuple[torch.Tensor, torch.Tensor]] | None = None

    def __post_init__(self) -> None:
        self.learning = torch.ones_like(self.rows[..., 0])
        self.masks = self.learning.clone()[..., None, None], torch.ones_like(self.B[..., :1], dtype=torch.bool)

    def hold(self) -> None:
        """Puts those that have stopped back to where they did."""
        for p, mask, kept in zip((self.A, self.B), self.masks, self.kept, strict=False):
            p.copy_(torch.where(mask, p, kept))

    def update_importance(self, beta_I: float, beta_U: float) -> None:
        updated = []
        before: Sequence[tuple[Any, Any]] = self.importance or [(0.0, 0.0)] * 2
        for p, (mean, spread) in zip((self.A, self.B), before, strict=True):
            if p.grad is None:
                raise RecipeError(
                    f"{self.path} has no gradient: call update_and_allocate between backward and zero_grad"
                )
            now = (p * p.grad).abs()
            spread = beta_U * spread + (1 - beta_U) * (now - mean).abs()
            updated.append((beta_I * mean + (1 - beta_I) * now, spread))
        self.importance = updated

    def score(self) -> torch.Tensor:
        """(..., k): the importance of those that learn, below everything for the others."""
        A, B = (mean * spread for mean, spread in self.importance or ())
        r, members = self.components.sum(-1), self.rows.to(B.dtype)
        of_A = A.sum((-2, -1)) / (r * A.shape[-1]).clamp(min=1)
        of_B = (members @ B.sum(-1, keepdim=True)).squeeze(-1) / (r * self.rows.sum(-1)).clamp(min=1)
        return torch.where(self.learning, of_A + of_B, -torch.inf)

    def choose(self, learning: torch.Tensor) -> None:
        self.learning.copy_(learning)
        mask_A, mask_B = self.masks
        mask_A.copy_(learning[..., None, None])
        mask_B.copy_((learning.unsqueeze(-1) & self.rows).any(-2).unsqueeze(-1))
        self.kept = self.A.detach().clone(), self.B.detach().clone()
        self.importance = None


def subspaces_of(tuned: fx.GraphModule, p: Placement) -> Subspaces:
    A, B, rows, components = (tensor_of(tuned, f"{ADAPTERS}.{p.resolve(n).name}") for n in NAMES)
    return Subspaces(p.target.file_path, A, B, rows, components)


class SubspaceAllocator:
    """Budget and importance of the subspaces of one resident AdaMSS adapter with use_asa.

    Make it once the graph is on its device. subspaces: which of them still learn, per target.
    """

    def __init__(self, tuned: fx.GraphModule, adapter: str = "default"):
        state = state_of(tuned, "SubspaceAllocator")
        self.config = cast("AdamssConfig", state.recipe[adapter].config)
        if self.config.peft_type != "ADAMSS" or not self.config.use_asa:
            raise RecipeError(f"adapter {adapter!r}: only AdaMSS with use_asa=True allocates subspaces")
        placements = state.recipe[adapter].placements
        self.subspaces = [subspaces_of(tuned, p) for p in placements if p.method == "ADAMSS"]
        self.total = sum(s.learning.numel() for s in self.subspaces)
        for s in self.subspaces:
            if not s.A.requires_grad:
                raise RecipeError(f"adapter {adapter!r} is not trained: load it with trainable=True")
            for p, mask in zip((s.A, s.B), s.masks, strict=True):
                weakref.finalize(self, p.register_hook(partial(torch.mul, mask)).remove)

    def budget(self, step: int) -> int:
        """Subspaces that may go on learning at `step` of the warm-up."""
        c = self.config
        left = 1 - (step - c.init_warmup) / (c.final_warmup - c.init_warmup)
        return int(c.asa_target_subspaces + (self.total - c.asa_target_subspaces) * left**c.asa_schedule_exponent)

    @torch.no_grad()
    def update_and_allocate(self, step: int) -> None:
        """Call once per training step, after `optimizer.step` and before `zero_grad`."""
        c = self.config
        for s in self.subspaces:
            s.hold()
        if not c.init_warmup <= step <= c.final_warmup:
            return
        for s in self.subspaces:
            s.update_importance(c.asa_importance_beta, c.asa_uncertainty_beta)
        if step % c.mask_interval == 0:
            self.choose(self.budget(step))

    def choose(self, budget: int) -> None:
        """Lets the `budget` most important subspaces go on."""
        scores = [s.score() for s in self.subspaces]
        everyone = torch.cat([score.flatten() for score in scores])
        chosen = torch.zeros_like(everyone, dtype=torch.bool)
        chosen[everyone.topk(min(budget, len(everyone))).indices] = True
        for s, part in zip(self.subspaces, chosen.split([score.numel() for score in scores]), strict=True):
            s.choose(part.view_as(s.learning) & s.learning)
