"""OSF: Orthogonal Subspace Fine-tuning (Nayak et al. 2025, arXiv 2504.07097).

    W' = W + U diag(S) V - U0 diag(S0) V0        U: (out, k'), S: (k',), V: (k', n), k' = min(out, n) - effective_rank

U0, S0, V0 are the smallest singular triplets of W, where U, S, V start: the identity up to rounding. They are computed from W
again when a file is read. Gradients of U and V are projected off the directions that stay frozen (U1, V1, the largest):

    dU <- dU - U1 (U1ᵀ dU),   dV <- dV - (dV V1ᵀ) V1

Deviations from PEFT, which is wrong there: several active adapters all count, the projection holds on half-precision
bases too, merging twice is refused and unmerging works, and a target that cannot be adapted is refused, not passed over.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial

import torch

from ..config import LORA_ONLY, AdapterConfig
from ..errors import RecipeError
from .base import Tensor
from .inits import normal
from .matrices import Matrices, row_size


@dataclass(frozen=True)
class OSFConfig(AdapterConfig):
    peft_type = "OSF"
    absent = LORA_ONLY | {"bias", "exclude_modules", "layers_pattern", "layers_to_transform"}

    effective_rank: int | float | None = None
    rank_pattern: dict | None = None
    init_weights: bool | None = True
    target_svd_config: dict | None = None
    patterns = ()  # rank_pattern's keys are searched for, not matched against whole names

    def __post_init__(self):
        super().__post_init__()
        for rank in (self.effective_rank, *(self.rank_pattern or {}).values()):
            if rank is not None and (isinstance(rank, bool) or not isinstance(rank, (int, float)) or rank <= 0):
                raise RecipeError(f"effective_rank={rank!r}: expected a positive number, or a fraction up to 1.0")

    def fallback_targets(self, table):
        return "all-linear"


class OSF(Matrices):
    name = "OSF"
    Config = OSFConfig

    def check(self, target, config):
        if reason := super().check(target, config):
            return reason
        least, frozen = min(target.out_features, row_size(target)), self.frozen(target, config)
        if not 0 < frozen < least:
            return f"effective_rank={frozen} of {least} leaves nothing to train or to keep; nearest valid: " + str(
                min(max(frozen, 1), least - 1)
            )
        return None

    def frozen(self, target, config) -> int:
        """Number of singular triplets that stay as they are."""
        least = min(target.out_features, row_size(target))
        found = (v for k, v in (config.rank_pattern or {}).items() if re.search(k, target.path))
        rank = next(found, config.effective_rank)
        if rank is None:
            return least // 2
        return min(least, int(least * rank if isinstance(rank, float) and rank <= 1 else rank))

    def tensors(self, target, config):
        m, n, k = target.out_features, row_size(target), self.frozen(target, config)
        low = min(m, n) - k
        shapes = {"U_low": (m, low), "S_low": (low,), "V_low": (low, n)}
        spec = {}
        for name, shape in shapes.items():
            start = normal if config.init_weights is False else partial(triplets, name[0], slice(k, None))
            spec[name] = Tensor(shape, start, f"osf_svd_params.{name}")
            spec[f"{name}_init"] = Tensor(shape, partial(triplets, name[0], slice(k, None)), trainable=False)
        spec["U_high"] = Tensor((m, k), partial(triplets, "U", slice(k)), trainable=False)
        spec["V_high"] = Tensor((k, n), partial(triplets, "V", slice(k)), trainable=False)
        return spec

    def matrices(self, theta, target, config):
        U1, V1 = theta["U_high"], theta["V_high"]
        U = through(theta["U_low"], lambda U: U - U1 @ (U1.mT @ U))
        V = through(theta["V_low"], lambda V: V - (V @ V1.mT) @ V1)
        U0, V0 = theta["U_low_init"] * theta["S_low_init"], theta["V_low_init"]
        return torch.cat([V, V0]), torch.cat([U * theta["S_low"], -U0], dim=1)


def through(value: torch.Tensor, projection) -> torch.Tensor:
    """`value`, whose gradient passes through the symmetric `projection`."""
    projected = projection(value)
    return value.detach() + (projected - projected.detach())


def triplets(factor: str, chosen: slice, tensor, W):
    """Singular vectors or values of W seen as a matrix, rounded through its dtype, as PEFT does."""
    W = W.flatten(1)
    U, S, V = torch.linalg.svd(W.to(torch.promote_types(W.dtype, torch.float32)), full_matrices=False)
    tensor.copy_({"U": U[:, chosen], "S": S[chosen], "V": V[chosen]}[factor].to(W.dtype))
