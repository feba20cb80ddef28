"""GLoRA: Generalized LoRA (Chavan et al. 2023, arXiv 2306.07967).

    W' = W * (1 + A) + B            A, B: a product Xd Xu of rank r, one number per row, one number, or zero
    b' = b * (1 + D) + E + W C      C: a product Xd Xu, a vector, or zero; D, E: a vector, one number, or zero

Without a bias C, D and E are zero. Starts as the identity (Xd = 0, vectors and numbers 0). PEFT files a zero term as a dense
buffer; so do we, unread. PEFT has plain nn.Linear; here convolutions as matrices (out, in / groups * kernel), embeddings and
experts as well. Several active adapters compose in their order, where PEFT sums their differences to W.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from ..config import LORA_ONLY, AdapterConfig
from ..fields import one_of, rank
from .base import Rewrite, Tensor
from .inits import kaiming, scaled_normal, zeros
from .matrices import row_size

FIELD = dict(A="config_A_B", B="config_A_B", C="config_C", D="config_D_E", E="config_D_E")


@dataclass
class GloraConfig(AdapterConfig):
    peft_type = "GLORA"
    absent = LORA_ONLY | {"exclude_modules", "layers_pattern", "layers_to_transform"}
    ranked = "r"

    r: int = rank(8)
    config_A_B: str = one_of("lora", "vector", "constant", "none")
    config_C: str = one_of("lora", "vector", "none")
    config_D_E: str = one_of("constant", "none", "vector")
    init_weights: bool = True


class GLoRA(Rewrite):
    name = "GLORA"
    Config = GloraConfig
    refuses = {"norm": "GLoRA rewrites matrices; this weight has shape {shape}"}
    off = {f"glora_{term}_{part}": 0.0 for term in FIELD for part in ("Xd", "X")}

    def tensors(self, target, config):
        m, n, spec = target.out_features, row_size(target), {}
        for term, shape in {"A": (m, n), "B": (m, n), "C": (n, 1), "D": (m,), "E": (m,)}.items():
            form = "none" if term in "CDE" and not target.has_bias else getattr(config, FIELD[term])
            for part, tensor in parts(form, shape, config).items():
                spec[f"glora_{term}_{part}"] = replace(tensor, key=f"glora_{term}.{part}")
        return spec

    def weight(self, W, b, theta, target, config):
        A, B, C, D, E = (value(theta, f"glora_{term}_") for term in FIELD)
        flat = W.flatten(1)
        b = None if b is None else affine(b, D, E)
        b = b if C is None else b + (flat @ C).squeeze(-1)
        return affine(flat, A, B).reshape(W.shape), b


def parts(form: str, shape: tuple[int, ...], config) -> dict[str, Tensor]:
    """The tensors of a term of this form and shape."""
    start = zeros if config.init_weights else partial(scaled_normal, 0.02) if form == "constant" else kaiming
    if form == "none":
        return {"zeros": Tensor(shape, zeros, trainable=False, derived=True)}
    if form == "lora":
        Xu = Tensor((config.r, *shape[1:]), kaiming, pad=((0, 1),))
        return {"Xu": Xu, "Xd": Tensor((shape[0], config.r), start, pad=((1, 1),))}
    return {"X": Tensor((1,) if form == "constant" else (shape[0], 1)[: len(shape)], start)}


def value(theta, name: str):
    """The matrix, vector or number of a term; None if it is zero."""
    return theta[f"{name}Xd"] @ theta[f"{name}Xu"] if f"{name}Xd" in theta else theta.get(f"{name}X")


def affine(value, factor, term):
    """value (1 + factor) + term, where there are such."""
    value = value if factor is None else value + value * factor
    return value if term is None else value + term
