"""FRoD: Full-Rank Efficient Fine-Tuning with Rotational Degrees (2025, AAAI, doi 10.1609/aaai.v40i31.39813).

    W' = U (S + diag(l)) Vᵀ        U: (out, n), V: (n, n), frozen; l: (n,), trained; S: (n, n), trained at few fixed positions

V is shared by the targets of a category (`self_attn_q_proj` of all layers) and made of all their weights: of the stacked
QR = [W_1; ...] it is Rᵀ times the eigenvectors of the mean of (Q_iᵀ Q_i + alpha)⁻¹, or the right singular vectors where the
stack has fewer rows than columns. U l = W V⁻ᵀ column by column with |U_j| = 1, so that it starts as W (S = 0), up to rounding.
The positions of S, off the diagonal, come from one CPU generator for all categories in alphabetical order. Files hold V and the
positions with save_projection; U is made again from W and the file's V (PEFT takes the V that it computes itself).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch

from ..config import LORA_ONLY, AdapterConfig
from ..errors import RecipeError
from .base import Rewrite, Tensor, Together
from .inits import scaled_normal, zeros
from .matrices import row_size


@dataclass(frozen=True)
class FrodConfig(AdapterConfig):
    peft_type = "FROD"
    absent = LORA_ONLY | {"exclude_modules"}
    refused = {
        "frod_dropout": "the adapted weight has no branch of its own whose input could be dropped",
        "runtime_offload_base_weight": "weights stay where the graph has them",
    }

    fan_in_fan_out: bool = False
    projection_prng_key: int = 0
    save_projection: bool = True
    frod_dropout: float = 0.0
    init_weights: bool = True
    sparse_rate: float = 0.01
    regularization_alpha: float = 1e-3
    progressbar: bool = True
    runtime_offload_base_weight: bool = False

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.sparse_rate <= 1:
            raise RecipeError(f"sparse_rate={self.sparse_rate!r}: expected 0 to 1")


class FRoD(Rewrite):
    name = "FROD"
    Config = FrodConfig

    def check(self, target, config):
        if target.kind == "expert" or len(target.shape) - len(target.kernel) != 2:
            return f"FRoD decomposes matrices; this {target.kind} weight has shape {target.shape}"
        return None

    def tensors(self, target, config):
        n = row_size(target)
        chosen = nonzeros(n, config.sparse_rate)
        values = zeros if config.init_weights else partial(scaled_normal, 0.1)
        noise = 0.0 if config.init_weights else 0.1
        return {
            "frod_lambda_l": Tensor((n,), partial(lengths, noise), "frod_lambda_l", needs=("frod_V",)),
            "frod_lambda_s_values": Tensor((chosen,), values, "frod_lambda_s_values"),
            "frod_U": Tensor((target.out_features, n), directions, trainable=False, like_base=True, needs=("frod_V",)),
        }

    def together(self, targets, config):
        groups: dict[str, dict[int, list]] = {}
        for i, target in enumerate(targets):
            groups.setdefault(category(target.path), {}).setdefault(layer_number(target.path, i), []).append(target)
        grouped, widths = [], ()
        for name, layers in sorted(groups.items()):
            members = [t for layer in layers.values() for t in layer]
            n, *others = sorted({row_size(t) for t in members})
            if others:
                raise RecipeError(
                    f"FROD: the targets of category {name!r} share one basis, but have {[n, *others]} inputs"
                )
            widths += (n,)
            sources = tuple(layers[i][-1] for i in sorted(layers))  # PEFT counts one weight per layer and category
            grouped.append((self.shared(name, n, widths, sources, config), tuple(t.name for t in members)))
        return Together(grouped=tuple(grouped))

    def shared(self, name: str, n: int, widths: tuple[int, ...], sources: tuple, config) -> dict[str, Tensor]:
        """What a category shares. widths: of the categories up to this one, in the order in which positions are drawn."""
        draw = partial(positions, config.projection_prng_key, widths, config.sparse_rate)
        basis = partial(shared_basis, config.regularization_alpha)
        spec = {
            "frod_V": Tensor((n, n), basis, trainable=False, like_base=True, sources=sources),
            "frod_s_indices": Tensor((2, nonzeros(n, config.sparse_rate)), draw, trainable=False, dtype=torch.int64),
            "frod_s_size": Tensor((2,), partial(filled, n), trainable=False, dtype=torch.int64),
        }
        return {k: replace(t, key=f"{k}.{name}") for k, t in spec.items()} if config.save_projection else spec

    def weight(self, W, b, theta, target, config):
        U, V, (row, column) = theta["frod_U"], theta["frod_V"], theta["frod_s_indices"].unbind()
        S = torch.diag_embed(theta["frod_lambda_l"]).index_put((row, column), theta["frod_lambda_s_values"])
        return (U @ S @ V.mT).reshape(W.shape), b


def category(path: str) -> str:
    """The role of a module that other layers have too: its last two names, or the last one behind a number."""
    parts = path.split(".")
    if len(parts) == 1 or parts[-2].isdigit():
        return parts[-1]
    role = f"{parts[-2]}_{parts[-1]}"
    return "attention_output" if role == "output_dense" and parts[-3:-2] == ["attention"] else role


def layer_number(path: str, otherwise: int) -> int:
    parts = path.split(".")
    after = parts[parts.index("layers") + 1 :][:1] if "layers" in parts else []
    return next((int(p) for p in (*after, *parts) if p.isdigit()), otherwise)


def nonzeros(n: int, rate: float) -> int:
    cells = n * n - n
    return max(min(int(n * n * rate), cells), 1 if rate > 0 and cells else 0)


# Initialisers


def positions(seed: int, widths: tuple[int, ...], rate: float, tensor, W=None):
    """Off-diagonal cells, drawn for every category up to this one."""
    generator = torch.Generator().manual_seed(seed)
    for n in widths:
        drawn = torch.randperm(n * n - n, generator=generator)
    cells = (~torch.eye(n, dtype=torch.bool)).nonzero()
    tensor.copy_(cells[drawn[: nonzeros(n, rate)]].mT)


def filled(n: int, tensor, W=None):
    tensor.fill_(n)


def shared_basis(alpha: float, tensor, weights):
    matrices = [W.flatten(1).to(torch.promote_types(W.dtype, torch.float32)).cpu() for W in weights]
    stacked = torch.cat(matrices)
    if stacked.shape[0] < stacked.shape[1]:
        V = torch.linalg.svd(stacked, full_matrices=True).Vh.mT
    else:
        Q, R = torch.linalg.qr(stacked)
        ridge = alpha * torch.eye(R.shape[1], dtype=R.dtype)
        inverses = [torch.linalg.inv(q.mT @ q + ridge) for q in Q.split([len(m) for m in matrices])]
        V = R.mT @ torch.linalg.eigh(sum(inverses) / len(inverses)).eigenvectors
    tensor.copy_(V.to(weights[0].dtype))  # rounded through the base's dtype, as PEFT does


def scaled_directions(W, V):
    """(U, l): U l = W V⁻ᵀ, columns of U of length 1."""
    W, V = W.flatten(1).double().cpu(), V.to(W.dtype).double().cpu()
    solution, singular = torch.linalg.solve_ex(V, W.mT)
    both = solution.mT if not singular else W @ torch.linalg.pinv(V, rtol=1e-6).mT
    length = torch.linalg.vector_norm(both, dim=0)
    return torch.where(length > 1e-12, both / length, 0.0), length


def directions(tensor, W, V):
    tensor.copy_(scaled_directions(W, V)[0])


def lengths(noise: float, tensor, W, V):
    tensor.copy_(scaled_directions(W, V)[1].to(W.dtype))
    if noise:
        tensor.add_(noise * torch.randn_like(tensor))
