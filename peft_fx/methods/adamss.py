"""AdaMSS: Adaptive Multi-Subspaces (NeurIPS 2025, openreview 8ZdWmpYxT0).

    [W' | b'] = [W | b] + D        rows C_i of D: B_i A_i V        A_i: (r_i, q), B_i: (|C_i|, r_i), V: (q, n + 1), frozen
    [W | b] ~ U S V                q = min(r, m, n + 1) directions, by torch.svd_lowrank seeded with random_seed
    C_i: cluster i of num_subspaces of the rows of U, by scikit-learn's KMeans
    r_i = subspace_rank, at most |C_i| and q; use_dynamic_rank: and the number of singular values s of U[C_i] with
          s² > svd_threshold s_1², but one at least

A_i starts with about the leading right singular vectors of U[C_i], by torch.svd_lowrank without a seed, as in PEFT; B_i with
zeros: the identity, except with init_weights None or False. Without a bias V has n columns; on convolutions W is W.flatten(1).
Files hold A_i, B_i and V; the clusters come from W again, and a file that does not fit them is refused (PEFT takes it). Here
all A_i are one tensor (k, R, q), zero beyond r_i, all B_i one (m, R). PEFT has linear weights only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec

import torch

from ..config import LORA_ONLY
from ..fields import nonnegative, one_of, rank
from .asa_fields import AsaFields
from .base import Pieces, Tensor
from .matrices import Matrices, row_size
from .subspaces import clusters, directions, existing, join_A, join_B, leading, split_A, split_B, start


@dataclass
class AdamssConfig(AsaFields):
    peft_type = "ADAMSS"
    absent = LORA_ONLY | {"bias", "exclude_modules"}
    ranked = "subspace_rank"

    r: int = rank(100)
    num_subspaces: int = rank(5)
    subspace_rank: int = rank(1)
    init_weights: str | bool | None = one_of("orthogonal", None, False)
    use_dynamic_rank: bool = False
    svd_threshold: float = nonnegative(0.1)
    random_seed: int = 0


class AdaMSS(Matrices):
    name = "ADAMSS"
    Config = AdamssConfig
    refuses = {"norm": "AdaMSS clusters the rows of a matrix; this weight has shape {shape}"}
    off = {"adamss_B": 0.0}

    def check(self, target, config):
        if find_spec("sklearn") is None:
            return "AdaMSS clusters the rows of W with scikit-learn, which is missing: pip install 'peft-fx[adamss]'"
        return super().check(target, config)

    def tensors(self, target, config):
        m, n = target.out_features, row_size(target) + target.has_bias
        q, k = min(config.r, m, n), min(config.num_subspaces, m)
        R, seed = min(config.subspace_rank, q), config.random_seed
        bias = replace(target, parameter=target.bias, kind="parameter", shape=(m,), transposed=False)
        sources = (target, bias) if target.has_bias else ()
        start_A = partial(leading, seed, config.svd_threshold if config.use_dynamic_rank else None)
        start_B = partial(start, 0.0 if config.init_weights else 0.01)
        by, grows = ("rows", "components"), ((1, 1),)
        A, B = Pieces(k, join_A, split_A, by[1:]), Pieces(k, join_B, split_B, by)
        return {
            "rows": Tensor((k, m), partial(clusters, q, seed), None, False, torch.bool, sources=sources),
            "adamss_newB": Tensor((q, n), partial(directions, q, seed), "adamss_newB", False, sources=sources),
            "adamss_A": Tensor((k, R, q), start_A, "adamss_A", pad=grows, needs=by[:1], pieces=A, sources=sources),
            "components": Tensor((k, R), existing, None, False, torch.bool, pad=grows, needs=("adamss_A",)),
            "adamss_B": Tensor((m, R), start_B, "adamss_B", pad=grows, needs=by, pieces=B),
        }

    def matrices(self, theta, target, config):
        A = (theta["adamss_A"] * theta["components"].unsqueeze(-1)).flatten(0, 1) @ theta["adamss_newB"]
        return A, (theta["adamss_B"].unsqueeze(1) * theta["rows"].mT.unsqueeze(-1)).flatten(1)
