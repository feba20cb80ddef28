"""Lily: Low-Rank Interconnected Adaptation across Layers (Zhong et al. 2024, arXiv 2407.09946).

    h = A x,  p = mean over all tokens of softmax(R h)
    y = W x + scaling * sum_e p_e B_eᵀ h           A: (r, n), B: (num_B * r, m), R: (num_B, r)

Layers with the same name and shape share one B, runs of stride_A of them one A; the router R is each layer's own. Every layer
files its copy of what it shares, and copies that differ are refused. Starts as the identity (B = 0). p depends on the input,
so that nothing can be merged; it is a mean over the whole batch, as in PEFT: a sample's output depends on its neighbours.
Deviations from PEFT: a second adapter shares too; "all-linear" and default targets share by the last part of their names.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from ..config import LORA_ONLY, AdapterConfig
from ..fields import checked, rank
from .base import Branch, Tensor, Together
from .inits import drawn_after, kaiming, zeros
from .scales import fixed


@dataclass
class LilyConfig(AdapterConfig):
    peft_type = "LILY"
    absent = LORA_ONLY | {"bias"}
    ranked = "r"

    r: int = rank(32)
    stride_A: int = checked(1, lambda n: n >= 1, "at least 1")
    num_B: int = checked(2, lambda n: n >= 2, "at least 2, as the router has nothing to choose from one")
    scaling: float = 1.0
    init_weights: bool = True


OTHER = "Lily routes the inputs of linear layers: no weight stands for that on another operator; this one is {shape}"


class Lily(Branch):
    name = "LILY"
    Config = LilyConfig
    refuses = dict.fromkeys(("conv1d", "conv2d", "conv3d", "embedding", "expert", "norm"), OTHER)
    no_weight = "an update that depends on the input"

    def tensors(self, target, config):
        return {"scaling": fixed(config.scaling)}

    def together(self, targets, config):
        groups: dict[tuple, list[str]] = {}
        grouped, own = [], {}
        for t in targets:
            groups.setdefault((suffix(t.path, config), t.shape), []).append(t.name)
        for (_, (m, n)), members in groups.items():
            A, B, router = (config.r, n), (config.num_B * config.r, m), (config.num_B, config.r)
            start_A = partial(drawn_after, kaiming, (A, B, router), kaiming)
            start_B = zeros if config.init_weights else kaiming
            shared = Tensor(B, start_B, ".lily_B.weight", pad=((0, config.num_B),))
            grouped.append(({"lily_B": shared}, tuple(members)))
            for i, name in enumerate(members):
                start = kaiming
                if i % config.stride_A:  # PEFT draws an A here too, before it shares
                    start = partial(drawn_after, kaiming, (A, B, router, A), kaiming)
                else:
                    shared = Tensor(A, start_A, ".lily_A.weight", pad=((0, 1),))
                    grouped.append(({"lily_A": shared}, tuple(members[i : i + config.stride_A])))
                own[name] = {"lily_router": Tensor(router, start, "lily_router.weight", pad=((1, 1),))}
        return Together(own=own, grouped=tuple(grouped))

    def delta(self, x, theta, target, config):
        h = x @ theta["lily_A"].mT
        p = (h @ theta["lily_router"].mT).softmax(-1).reshape(-1, config.num_B).mean(0)
        B = (theta["lily_B"].unflatten(0, (config.num_B, -1)) * p[:, None, None]).sum(0)
        return h @ B * theta["scaling"]


def suffix(path: str, config) -> str:
    """The entry of target_modules that a layer goes by: the longest one, or the regex; else the last part of its name."""
    wanted = config.target_modules
    if isinstance(wanted, str) and wanted.lower() != "all-linear":
        return wanted
    fits = [w for w in (() if isinstance(wanted, str) else wanted or ()) if path.endswith(w)]
    return max(fits, key=len) if fits else path.rpartition(".")[2]
