"""`combine`: several adapters as one LoRA adapter, a weighted sum of their updates or of their factors.

    dW_k = f_k(W) - W, s_k B_k A_k for LoRA                  t: over adapters k with weights w_k
    svd          B A = U_r S_r V_rᵀ of t(dW)                  any method with an update
    cat          A = [w_k s_k A_k], B = [B_k]                 exactly sum_k w_k dW_k
    linear       A = t(A_k), B = t(B_k), w = sqrt |w_k s_k|, A with the sign of w_k s_k
    ties, dare_linear, dare_ties, magnitude_prune             t on the factors; with _svd at the end, t on the updates

    t = sum_k w_k prune(x_k), where signs are elected: of the entries that agree with the elected sign, by their number

TIES: Yadav et al. 2023, arXiv 2306.01708. DARE: Yu et al. 2023, arXiv 2311.03099. The new adapter has s = 1 whatever its parts
have (PEFT's copies use_rslora and is off by sqrt(r) then), and a rank per target.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx

from ..config import AdapterConfig
from ..engine.adding import base_weight, with_adapter
from ..engine.derive import derived
from ..engine.filing import adapter_files
from ..engine.merging import theta_of
from ..engine.transitions import names_of, planned
from ..errors import RecipeError, UnsupportedError, WrongTypeError
from ..methods.base import Additive
from ..methods.ia3 import IA3Config
from ..methods.lora import LoRA, LoraConfig
from ..planning.plan import Placement
from ..store.state import State, state_of
from ..store.tensors import kept_of

# name -> (how entries are pruned, whether signs are elected)
RULES = {
    "linear": ("", False), "cat": ("", False), "svd": ("", False), "ties": ("magnitude", True),
    "dare_linear": ("random", False), "dare_ties": ("random", True), "magnitude_prune": ("magnitude", False),
}  # fmt: skip
TYPES = (*RULES, *(f"{name}_svd" for name, (pruned, _) in RULES.items() if pruned))
SIGNS = ("total", "frequency")


@dataclass(frozen=True)
class Combination:
    """How to combine, checked. svd_driver: of torch.linalg.svd, on CUDA."""

    type: str = "svd"
    svd_rank: int | None = None
    svd_clamp: float | None = None
    svd_full_matrices: bool = True
    svd_driver: str | None = None
    density: float | None = None
    majority_sign_method: str = "total"

    def __post_init__(self) -> None:
        if self.type not in TYPES:
            raise ValueError(f"combination_type={self.type!r}: expected one of {', '.join(TYPES)}")
        if self.majority_sign_method not in SIGNS:
            raise UnsupportedError(
                f"majority_sign_method={self.majority_sign_method!r}: expected one of {', '.join(SIGNS)}"
            )
        if self.svd_rank is not None and self.svd_rank < 0:
            raise RecipeError(f"svd_rank={self.svd_rank}: expected a rank of 1 or more, or None for the parts' largest")
        if self.rule[0] and not (isinstance(self.density, (int, float)) and 0 <= self.density <= 1):
            raise WrongTypeError(
                f"{self.type} needs density, the share of entries that are kept, from 0 to 1; got {self.density!r}"
            )

    @property
    def rule(self) -> tuple[str, bool]:
        return RULES[self.type.removesuffix("_svd")]

    @property
    def of_updates(self) -> bool:
        """Whether updates are summed, not factors."""
        return self.type.endswith("svd")


def combine(tuned: fx.GraphModule, adapters: Sequence[str], weights: Sequence[float], adapter_name: str,
            combination_type: str = "svd", **options: Any) -> fx.GraphModule:  # fmt: skip
    """The graph with one more resident LoRA adapter, which does not act until `set_adapter`, made of others.

    weights: one per adapter; negative ones subtract. options: svd_rank, svd_clamp, svd_full_matrices, svd_driver, density,
    majority_sign_method, as in PEFT's add_weighted_adapter. Factors are combined only of LoRA adapters without DoRA. Raises
    RecipeError and ValueError; nothing has changed then.
    """
    state = state_of(tuned, "combine")
    names = names_of(state, list(adapters))
    new = combined(tuned, names, weights, Combination(combination_type, **options))
    gm = with_adapter(tuned, adapter_name, new[0], (new[1], "the combination"), True, activate=False)
    return derived(gm, state_of(gm))


@torch.no_grad()
def combined(
    gm: fx.GraphModule, names: Sequence[str], weights: Sequence[float], how: Combination
) -> tuple[LoraConfig, dict]:
    """The config and file key -> tensor of the combination."""
    state = state_of(gm)
    refuse_lengths(names, weights)
    groups = targets_of(state, names)
    factors = {}
    for name, found in groups.items():
        parts = [(p, weights[names.index(p.adapter)]) for p in found]
        factors[name] = by_update(gm, parts, how) if how.of_updates else by_factors(gm, parts, how)
    ranks = {name: A.shape[0] for name, (A, _) in factors.items()}
    rank = max(ranks.values())
    others = {f"^{re.escape(groups[n][0].target.pattern_path)}": r for n, r in ranks.items() if r != rank}
    first = state.recipe[names[0]].config
    config = LoraConfig(
        task_type=first.task_type, base_model_name_or_path=first.base_model_name_or_path, r=rank, lora_alpha=rank,
        target_modules=[g[0].target.wrapper or g[0].target.path for g in groups.values() if not g[0].target.by_parameter],
        target_parameters=[n for n, g in groups.items() if g[0].target.by_parameter] or None,
        rank_pattern=others, alpha_pattern=others,
    )  # fmt: skip
    tensors = {}
    for p, tensor_name, (key, *_) in planned(state, "combined", config).filed:
        A, B = factors[p.target.name]
        value = A if tensor_name == cast(LoRA, p.rule).names(p.target)[0] else B
        tensors[key] = value.reshape(p.tensors[tensor_name].shape).to(kept_of(gm, p.target.name).device)
    return config, tensors


@torch.no_grad()
def weighted(
    gm: fx.GraphModule,
    names: Sequence[str],
    weights: Sequence[float],
    type: str | None = None,
    *options: Any,
    **named: Any,
) -> tuple[AdapterConfig, dict]:
    """`combined` with these fields of `Combination`; `combined_scales` where none are given and all adapters are IA3's."""
    plain = type is None and not options and not named
    if plain and all(state_of(gm).recipe[n].config.peft_type == "IA3" for n in names):
        return combined_scales(gm, names, weights)
    return combined(gm, names, weights, Combination(type or "svd", *options, **named))


def combined_scales(gm: fx.GraphModule, names: Sequence[str], weights: Sequence[float]) -> tuple[IA3Config, dict]:
    """The config and file key -> tensor of IA3 adapters as one IA3 adapter: l = sum_k w_k l_k, over those on a module."""
    refuse_lengths(names, weights)
    targets_of(state_of(gm), names)
    parts = [adapter_files(gm, name) for name in names]
    tensors: dict[str, torch.Tensor] = {}
    for (_, found), weight in zip(parts, weights, strict=True):
        for key, scale in found.items():
            before = tensors.get(key, torch.zeros_like(scale))
            if before.shape != scale.shape:
                raise RecipeError(
                    f"{key}: a feed-forward module for some of {', '.join(names)} alone, whose scales have no sum"
                )
            tensors[key] = before + weight * scale
    fields: dict[str, Any] = {
        f: union(f, [getattr(c, f) for c, _ in parts]) for f in ("target_modules", "feedforward_modules")
    }
    return dataclasses.replace(cast(IA3Config, parts[0][0]), **fields), tensors


def union(field: str, entries: list[list[str] | str | None]) -> list[str] | str:
    """What any of several configs chooses by a field. Raises RecipeError for names beside regexes."""
    regexes = [e for e in entries if isinstance(e, str)]
    if regexes and len(regexes) < len(entries):
        raise RecipeError(
            f"{field} is a regex in some adapters and a list in others: write all as one kind; got {entries}"
        )
    return "|".join(f"({e})" for e in regexes) if regexes else sorted({name for e in entries for name in e or ()})


def refuse_lengths(names: Sequence[str], weights: Sequence[float]) -> None:
    if len(names) != len(weights) or not names:
        raise RecipeError(f"{len(names)} adapters and {len(weights)} weights: give one weight for each adapter")


def targets_of(state: State, names: Sequence[str]) -> dict[str, list[Placement]]:
    """Target -> the adapters' placements there. Raises RecipeError for what is no update of a weight."""
    groups: dict[str, list[Placement]] = {}
    for name in names:
        for p in state.recipe[name].placements:
            if reason := p.rule.no_weight:
                raise RecipeError(f"{p.target.name}: {p.method} cannot be combined: {reason}")
            if p.target.kind not in ("linear", "embedding", "conv1d", "conv2d", "conv3d") or p.rule.dense_groups(
                p.target
            ):
                raise RecipeError(
                    f"{p.target.name}: {p.method} of {name!r} cannot be combined there: expected linear, embedding and "
                    f"convolution without groups, got {p.target.kind}; leave it out of the adapters"
                )
            groups.setdefault(p.target.name, []).append(p)
    return groups


def by_update(
    gm: fx.GraphModule, parts: list[tuple[Placement, float]], how: Combination
) -> tuple[torch.Tensor, torch.Tensor]:
    """A (r, n) and B (m, r) of the best rank r for the sum of updates."""
    T = mixed([update(gm, p) for p, _ in parts], [w for _, w in parts], how)
    rank = how.svd_rank or max(rank_of(p) for p, _ in parts)
    U, S, Vh = torch.linalg.svd(T, full_matrices=how.svd_full_matrices, driver=how.svd_driver if T.is_cuda else None)
    rank = min(rank, len(S))
    B, A = U[:, :rank] * S[:rank], Vh[:rank]
    if how.svd_clamp is not None:
        entries = torch.cat([B.flatten(), A.flatten()])
        limit = entries.kthvalue(1 + round(how.svd_clamp * (entries.numel() - 1))).values
        B, A = B.clamp(-limit, limit), A.clamp(-limit, limit)
    return A, B


def by_factors(
    gm: fx.GraphModule, parts: list[tuple[Placement, float]], how: Combination
) -> tuple[torch.Tensor, torch.Tensor]:
    """A (r, n) and B (m, r) from the parts' own."""
    As, Bs, scaled = [], [], []
    for p, weight in parts:
        A, B, scale = factors_of(gm, p)
        As.append(A)
        Bs.append(B)
        scaled.append(weight * scale)
    if how.type == "cat":
        return torch.cat([w * A for w, A in zip(scaled, As, strict=True)]), torch.cat(Bs, 1)
    if len({A.shape for A in As}) > 1:
        raise ValueError(
            f"{parts[0][0].target.name}: {how.type} needs equal ranks, got {[len(A) for A in As]}: take cat or an svd type"
        )
    roots = [math.sqrt(abs(w)) for w in scaled]
    signed = [math.copysign(root, w) for root, w in zip(roots, scaled, strict=True)]
    return mixed(As, signed, how), mixed(Bs, roots, how)


def factors_of(gm: fx.GraphModule, p: Placement) -> tuple[torch.Tensor, torch.Tensor, float]:
    """LoRA's A (r, n), B (m, r) in fp32 at least, and scale. Raises RecipeError for other methods."""
    if p.method != "LORA" or "lora_B_bias" in p.tensors:
        raise RecipeError(f"{p.target.name}: {p.method} has no two factors that can be summed: take an svd type")
    f = cast(Additive, p.rule).factors(wide(theta_of(gm, p)), p.target, p.config)
    return f.A.flatten(1), f.B, float(f.scale)


def update(gm: fx.GraphModule, p: Placement) -> torch.Tensor:
    """dW (m, n) in fp32 at least."""
    W, theta = base_weight(gm, p.target), wide(theta_of(gm, p))
    W = W.to(torch.promote_types(W.dtype, torch.float32))
    start = torch.zeros_like(W) if isinstance(p.rule, Additive) and not p.rule.reads else W
    new, b = p.rule.weight(start, None, theta, p.target, p.config)
    if b is not None:
        raise RecipeError(
            f"{p.target.name}: {p.method} of {p.adapter!r} changes the bias too, which LoRA without bias cannot"
        )
    return (new - start).flatten(1)


def wide(theta: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        k: t.to(torch.promote_types(t.dtype, torch.float32)) if t.is_floating_point() else t for k, t in theta.items()
    }


def rank_of(p: Placement) -> int:
    """The rank of a part, where its method has one. Raises ValueError."""
    rank = getattr(p.rule, "rank", None)
    if rank is None:
        raise WrongTypeError(f"{p.method} has no rank: give svd_rank, the rank of the combination")
    return rank(p.target, p.config)


def mixed(tensors: list[torch.Tensor], weights: list[float], how: Combination) -> torch.Tensor:
    """t of the docstring."""
    pruning, elected = how.rule
    stack = torch.stack([PRUNE[pruning](t, how.density) for t in tensors])
    scaled = stack * stack.new_tensor(weights).view(-1, *(1,) * tensors[0].dim())
    if not elected:
        return scaled.sum(0)
    votes = stack.sum(0) if how.majority_sign_method == "total" else stack.sign().sum(0)
    agree = stack.sign() == torch.where(votes >= 0, 1.0, -1.0)
    return (scaled * agree).sum(0) / agree.sum(0).clamp(min=1)


def of_largest(t: torch.Tensor, density: float) -> torch.Tensor:
    """Zeros but for the share `density` of entries with the largest magnitude."""
    kept = t.abs().flatten().topk(int(density * t.numel())).indices
    return torch.zeros_like(t).flatten().index_copy(0, kept, t.flatten()[kept]).view(t.shape)


def at_random(t: torch.Tensor, density: float) -> torch.Tensor:
    """Each entry with probability `density`, divided by it."""
    return t * torch.bernoulli(torch.full_like(t, density)) / density if density else torch.zeros_like(t)


PRUNE = {"": lambda t, density: t, "magnitude": of_largest, "random": at_random}
