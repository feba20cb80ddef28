"""OSF: Orthogonal Subspace Fine-tuning (Nayak et al. 2025, arXiv 2504.07097).

    W' = W + U diag(S) V - U0 diag(S0) V0        U: (out, k'), S: (k',), V: (k', n), k' = min(out, n) - effective_rank

U0, S0, V0 are the smallest singular triplets of W, where U, S, V start: the identity up to rounding. They are computed from W
again when a file is read. Gradients of U and V are projected off the directions that stay frozen (U1, V1, the largest):
dU <- dU - U1 (U1ᵀ dU), dV <- dV - (dV V1ᵀ) V1. Deviations from PEFT, which is wrong there: several active adapters all
count, the projection holds on half-precision bases too, merging twice is refused and unmerging works, and a target that
cannot be adapted is refused, not passed over.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial

import torch

from ..checks import check_positive
from ..config import LORA_ONLY, AdapterConfig
from ..fields import pattern_field, positive
from .base import Tensor
from .decompositions import decompose, smallest, split_at
from .inits import normal
from .matrices import Matrices, row_size


@dataclass
class OSFConfig(AdapterConfig):
    peft_type = "OSF"
    absent = LORA_ONLY | {"bias", "exclude_modules", "layers_pattern", "layers_to_transform"}

    effective_rank: int | float | None = positive(None)
    rank_pattern: dict | None = pattern_field(check_positive, default=None)
    init_weights: bool | None = True
    target_svd_config: dict | None = None
    patterns = ()  # rank_pattern's keys are searched for, not matched against whole names

    def fallback_targets(self, table):
        return "all-linear"


class OSF(Matrices):
    name = "OSF"
    Config = OSFConfig
    one_size = "the rank says where the decomposition of the weight is cut"

    def check(self, target, config):
        if reason := super().check(target, config):
            return reason
        least, k = min(target.out_features, row_size(target)), self.frozen(target, config)
        valid = min(max(k, 1), least - 1)
        reason = f"effective_rank={k} of {least} leaves nothing to train or to keep; nearest valid: {valid}"
        return None if 0 < k < least else reason

    def frozen(self, target, config) -> int:
        """Number of singular triplets that stay as they are."""
        least = min(target.out_features, row_size(target))
        found = (v for k, v in (config.rank_pattern or {}).items() if re.search(k, target.path))
        rank = next(found, least // 2 if config.effective_rank is None else config.effective_rank)
        return min(least, int(least * rank if isinstance(rank, float) and rank <= 1 else rank))

    def tensors(self, target, config):
        m, n, k = target.out_features, row_size(target), self.frozen(target, config)
        least, from_W = min(m, n), config.init_weights is not False
        spec = {"svd": Tensor((m + n + 1, least), decompose, trainable=False)}
        shapes = {"U_low": (m, least - k), "S_low": (least - k,), "V_low": (least - k, n)}
        for i, (name, shape) in enumerate(shapes.items()):
            start = partial(smallest, k, m, i) if from_W else normal
            spec[name] = Tensor(shape, start, f"osf_svd_params.{name}", needs=("svd",) if from_W else ())
        return spec

    def matrices(self, theta, target, config):
        (U1, _, V1), (U0, S0, V0) = split_at(self.frozen(target, config), theta["svd"], target.out_features)
        U, V = theta["U_low"], theta["V_low"]
        frozen_U, frozen_V = U1 @ (U1.mT @ U), (V @ V1.mT) @ V1  # taken off the gradients, not off the values
        U, V = U - (frozen_U - frozen_U.detach()), V - (frozen_V - frozen_V.detach())
        return torch.cat([V, V0]), torch.cat([U * theta["S_low"], -U0 * S0], dim=1)
