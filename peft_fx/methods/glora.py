"""GLoRA: Generalized LoRA (Chavan et al. 2023, arXiv 2306.07967).

    W' = W * (1 + A) + B            A, B: a product Xd Xu of rank r, one number per row, one number, or zero
    b' = b * (1 + D) + E + W C      C: a product Xd Xu, a vector, or zero; D, E: a vector, one number, or zero

Without a bias C, D and E are zero. Starts as the identity (Xd = 0, vectors and numbers 0). PEFT files a zero term as a dense
buffer; so do we, unread. PEFT has plain nn.Linear; here convolutions as matrices (out, in / groups * kernel), embeddings and
experts as well. Several active adapters compose in their order, where PEFT sums their differences to W.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

from ..config import LORA_ONLY, AdapterConfig, check_rank
from ..errors import RecipeError
from .base import Rewrite, Tensor
from .inits import each, kaiming, scaled_normal, zeros

FORMS = {
    "config_A_B": ("lora", "vector", "constant", "none"),
    "config_C": ("lora", "vector", "none"),
    "config_D_E": ("constant", "none", "vector"),
}
FIELD = dict(A="config_A_B", B="config_A_B", C="config_C", D="config_D_E", E="config_D_E")


@dataclass(frozen=True)
class GloraConfig(AdapterConfig):
    peft_type = "GLORA"
    absent = LORA_ONLY | {"exclude_modules", "layers_pattern", "layers_to_transform"}

    r: int = 8
    config_A_B: str = "lora"
    config_C: str = "lora"
    config_D_E: str = "constant"
    init_weights: bool = True

    def __post_init__(self):
        super().__post_init__()
        check_rank("r", self.r)
        for field, forms in FORMS.items():
            if getattr(self, field) not in forms:
                raise RecipeError(f"{field}={getattr(self, field)!r}: expected one of {forms}")

    def with_rank(self, rank):
        return replace(self, r=rank)


class GLoRA(Rewrite):
    name = "GLORA"
    refuses = {"norm": "GLoRA rewrites matrices; this weight has shape {shape}"}
    Config = GloraConfig

    def form(self, term: str, target, config) -> str:
        return "none" if term in "CDE" and not target.has_bias else getattr(config, FIELD[term])

    def tensors(self, target, config):
        experts = target.shape[:1] if target.experts else ()
        m, n = target.out_features, target.in_features // target.groups * math.prod(target.kernel)
        size = {"A": (*experts, m, n), "B": (*experts, m, n), "C": (n, 1), "D": (m,), "E": (m,)}
        spec = {}
        for term, shape in size.items():
            forms = described(shape, config.r, config.init_weights)
            for part, tensor in forms[self.form(term, target, config)].items():
                spec[f"glora_{term}_{part}"] = replace(tensor, key=f"glora_{term}.{part}")
        return spec

    def neutral(self, target, config):
        forms = {term: self.form(term, target, config) for term in FIELD}
        return {f"glora_{t}_{'Xd' if f == 'lora' else 'X'}": 0.0 for t, f in forms.items() if f != "none"}

    def term(self, name: str, theta, target, config):
        """The matrix, vector or number of one term; None if it is zero."""
        form = self.form(name, target, config)
        if form == "none":
            return None
        return theta[f"glora_{name}_Xd"] @ theta[f"glora_{name}_Xu"] if form == "lora" else theta[f"glora_{name}_X"]

    def weight(self, W, b, theta, target, config):
        A, B, C, D, E = (self.term(name, theta, target, config) for name in FIELD)
        flat = W.flatten(1) if target.kernel else W
        new = flat if A is None else flat + flat * A
        new = new if B is None else new + B
        if b is not None:
            new_b = b if D is None else b + b * D
            new_b = new_b if E is None else new_b + E
            b = new_b if C is None else new_b + (flat @ C).squeeze(-1)
        return new.reshape(W.shape), b


def described(shape: tuple[int, ...], r: int, identity: bool) -> dict[str, dict[str, Tensor]]:
    """Form of a term of this shape -> its tensors, still without keys."""
    *rows, n = shape if len(shape) > 1 else (*shape, 1)
    stack, m, axis = tuple(rows[:-1]), rows[-1], len(rows) - 1
    start = partial(each, kaiming) if stack else kaiming
    row = kaiming if len(shape) == 2 else partial(each, kaiming) if stack else kaiming_row
    return {
        "lora": {
            "Xd": Tensor((*stack, m, r), zeros if identity else start, pad=((axis + 1, 1),)),
            "Xu": Tensor((*stack, r, n), start, pad=((axis, 1),)),
        },
        "vector": {"X": Tensor((m,) if len(shape) == 1 else (*stack, m, 1), zeros if identity else row)},
        "constant": {"X": Tensor((1,), zeros if identity else partial(scaled_normal, 0.02))},
        "none": {"zeros": Tensor(shape, zeros, trainable=False)},
    }


def kaiming_row(tensor, W=None):
    kaiming(tensor.unsqueeze(0))
