"""What FRoD computes: which targets share a basis, that basis, the positions of S, and U and l for one weight.

    V: of the stacked QR = [W_1; ...] Rᵀ times the eigenvectors of the mean of (Q_iᵀ Q_i + alpha)⁻¹, or the right singular
    vectors where the stack has fewer rows than columns.  U l0 = W V⁻ᵀ column by column with |U_j| = 1

Initialisers: (empty tensor, W or the weights of `sources`, *needed) -> None, in place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch

from ..errors import RecipeError
from ..target import Target
from .base import Tensor
from .inits import constant
from .matrices import row_size


def categories(targets: Sequence[Target]) -> Iterator[tuple[str, int, tuple[Target, ...], tuple[str, ...]]]:
    """In alphabetical order: name, number of inputs, the targets whose weights make the basis, the names of all."""
    groups: dict[str, list] = {}
    for i, target in enumerate(targets):
        path = target.tensor_name if target.by_parameter else target.path
        groups.setdefault(category(path), []).append((layer_number(path, i), target))
    for name, members in sorted(groups.items()):
        n, *others = sorted({row_size(t) for _, t in members})
        if others:
            raise RecipeError(f"FROD: the targets of category {name!r} share one basis, but have {[n, *others]} inputs")
        counted = {(layer, t.expert or 0): t for layer, t in members}  # as in PEFT one per layer and category
        yield name, n, tuple(counted[key] for key in sorted(counted)), tuple(t.name for _, t in members)


def of_category(name: str, widths: tuple[int, ...], sources: tuple[Target, ...], config) -> dict[str, Tensor]:
    """What a category shares. widths: of the categories up to this one, in the order in which positions are drawn."""
    n, rate = widths[-1], config.sparse_rate
    draw = partial(positions, config.projection_prng_key, widths, rate)
    basis = partial(shared_basis, config.regularization_alpha)
    filed = config.save_projection
    spec = {
        "frod_V": Tensor((n, n), basis, trainable=False, like_base=True, sources=sources),
        "frod_s_indices": Tensor((2, nonzeros(n, rate)), draw, trainable=False, dtype=torch.int64, derived=not filed),
        "frod_s_size": Tensor((2,), partial(constant, n), trainable=False, dtype=torch.int64, derived=not filed),
    }
    return {k: replace(t, key=f"{k}.{name}") for k, t in spec.items()} if filed else spec


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


def positions(seed: int, widths: tuple[int, ...], rate: float, tensor, W=None):
    """Off-diagonal cells, drawn for every category up to this one."""
    generator = torch.Generator().manual_seed(seed)
    for n in widths:
        drawn = torch.randperm(n * n - n, generator=generator)
    cells = (~torch.eye(n, dtype=torch.bool)).nonzero()
    tensor.copy_(cells[drawn[: nonzeros(n, rate)]].mT)


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


def decompose(tensor, W, V):
    """U and, as one more row, l: U l = W V⁻ᵀ, columns of U of length 1."""
    W, V = W.flatten(1).double().cpu(), V.to(W.dtype).double().cpu()
    solution, singular = torch.linalg.solve_ex(V, W.mT)
    both = solution.mT if not singular else W @ torch.linalg.pinv(V, rtol=1e-6).mT
    length = torch.linalg.vector_norm(both, dim=0)
    tensor.copy_(torch.cat([torch.where(length > 1e-12, both / length, 0.0), length.unsqueeze(0)]))


def start(noise: float, tensor, W, decomposed):
    tensor.copy_(decomposed[-1])
    if noise:
        tensor.add_(noise * torch.randn_like(tensor))
