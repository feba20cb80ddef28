"""FRoD: Full-Rank Efficient Fine-Tuning with Rotational Degrees (2025, AAAI, doi 10.1609/aaai.v40i31.39813).

    W' = U (S + diag(l)) Vᵀ        U: (out, n), V: (n, n), frozen; l: (n,), trained; S: (n, n), trained at few fixed positions
       = W + U (S + diag(l - l0)) Vᵀ        l0: l at the start, where W = U diag(l0) Vᵀ and S = 0

The second form is the one used: it starts as W without rounding, and adds to what other adapters on the target do, as PEFT's
differences do. V is shared by the targets of a category (`self_attn_q_proj` of all layers) and made of all their weights, U and
l0 of V and W (rotations.py). The positions of S, off the diagonal, come from one CPU generator for all categories in
alphabetical order. Files hold V and the positions with save_projection; U is made again from W and the file's V (PEFT takes
the V that it computes itself).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from ..config import LORA_ONLY, AdapterConfig
from ..fields import checked, probability
from .base import Branch, Tensor, Together
from .inits import near
from .matrices import row_size
from .rotations import categories, decompose, nonzeros, of_category, start


@dataclass
class FrodConfig(AdapterConfig):
    peft_type = "FROD"
    absent = LORA_ONLY | {"exclude_modules"}
    refused = {"runtime_offload_base_weight": "weights stay where the graph has them"}

    fan_in_fan_out: bool = False
    projection_prng_key: int = 0
    save_projection: bool = True
    frod_dropout: float = probability()
    init_weights: bool = True
    sparse_rate: float = checked(0.01, lambda rate: 0 <= rate <= 1, "0 to 1")
    regularization_alpha: float = 1e-3
    progressbar: bool = True
    runtime_offload_base_weight: bool = False


class FRoD(Branch):
    name = "FROD"
    Config = FrodConfig
    one_size = "entries of zero would need positions of their own"
    refuses = {"norm": "FRoD decomposes matrices; this weight has shape {shape}"}
    drops = "frod_dropout"

    def tensors(self, target, config):
        m, n = target.out_features, row_size(target)
        values, begin = near(0.0, config), partial(start, 0.0 if config.init_weights else 0.1)
        return {
            "decomposed": Tensor((m + 1, n), decompose, trainable=False, like_base=True, needs=("frod_V",)),
            "frod_lambda_s_values": Tensor((nonzeros(n, config.sparse_rate),), values, "frod_lambda_s_values"),
            "frod_lambda_l": Tensor((n,), begin, "frod_lambda_l", needs=("decomposed",)),
        }

    def together(self, targets, config):
        groups, widths = [], tuple[int, ...]()
        for name, n, sources, members in categories(targets):
            widths += (n,)
            groups.append((of_category(name, widths, sources, config), members))
        return Together(grouped=tuple(groups))

    def delta(self, x, theta, target, config):
        return rotated(x.to(theta["frod_V"].dtype) @ theta["frod_V"], theta)

    def weight(self, W, b, theta, target, config):
        return W + rotated(theta["frod_V"], theta).mT.reshape(W.shape), b


def rotated(z, theta):
    """U ((S + diag(l - l0)) z) in the dtype of z, which lies along the last axis."""
    (row, column), decomposed = theta["frod_s_indices"].unbind(), theta["decomposed"]
    lengths = (theta["frod_lambda_l"] - decomposed[-1]).to(z.dtype)
    sparse = z.index_select(-1, column) * theta["frod_lambda_s_values"].to(z.dtype)
    return (z * lengths).index_add(-1, row, sparse) @ decomposed[:-1].mT
