"""VB-LoRA: Vector Bank (Li et al. 2024, arXiv 2405.15179).

    W' = W + B A        every block of v numbers in A's rows and B's columns:  sum over its top-k logits of softmax * bank row
    bank: (N, v), shared by all targets; logits_A: (r, n / v, N), logits_B: (out / v, r, N)

Not the identity at the start: the product of two small random matrices. With save_only_topk_weights files hold the chosen
rows and k - 1 of their weights instead of the logits (the last weight is what is missing to 1); they are read as logits that
are -inf elsewhere, as in PEFT, and are not trained on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch

from ..config import LORA_ONLY, AdapterConfig
from ..fields import probability, rank
from .base import Tensor, Together
from .inits import drawn_after, scaled_normal, uniform
from .matrices import Matrices, row_size
from .shapes import indivisible
from .topk import topk_pieces


@dataclass
class VBLoRAConfig(AdapterConfig):
    peft_type = "VBLORA"
    absent = LORA_ONLY

    r: int = rank(4)
    num_vectors: int = rank(256)
    vector_length: int = rank(256)
    topk: int = rank(2)
    save_only_topk_weights: bool = False
    vblora_dropout: float = probability()
    fan_in_fan_out: bool = False
    init_vector_bank_bound: float = 0.02
    init_logits_std: float = 0.1

    def part_only(self):
        if self.save_only_topk_weights:
            return f"holds the {self.topk} largest logits of each mixture (save_only_topk_weights), the others are infinite"
        return ""


class VBLoRA(Matrices):
    name = "VBLORA"
    Config = VBLoRAConfig
    one_size = "logits of zero choose vectors too"
    drops = "vblora_dropout"

    def check(self, target, config):
        if reason := super().check(target, config):
            return reason
        m, n, N = target.out_features, row_size(target), config.num_vectors
        if config.topk > N:
            return f"topk={config.topk} is more than num_vectors={N}; nearest valid: {N}"
        undivided = partial(indivisible, "vector_length", config.vector_length)
        return undivided(m, f"the out features {m}") or undivided(n, f"the in features {n}")

    def tensors(self, target, config):
        v, N, start = config.vector_length, config.num_vectors, partial(scaled_normal, config.init_logits_std)
        A, B = (config.r, row_size(target) // v, N), (target.out_features // v, config.r, N)
        pieces = topk_pieces(config.topk) if config.save_only_topk_weights else None
        return {
            "vblora_logits_A": Tensor(A, start, "vblora_logits_A", pieces=pieces),
            "vblora_logits_B": Tensor(B, start, "vblora_logits_B", pieces=pieces),
        }

    def together(self, targets, config):
        shape, start = (config.num_vectors, config.vector_length), partial(uniform, config.init_vector_bank_bound)
        logits, own, name = [], {}, "vblora_logits_A"
        for i, t in enumerate(targets):
            specs = self.tensors(t, config)
            logits.append([(spec.shape, spec.init) for spec in specs.values()])
            drawn = partial(drawn_after, start, (shape,) if i else (), specs[name].init)
            own[t.name] = {name: replace(specs[name], init=drawn)}
        bank = Tensor(shape, partial(last_bank, start, logits[:-1]), "vblora_vector_bank")
        return Together({"vblora_vector_bank": bank}, own)

    def matrices(self, theta, target, config):
        A, B = (mixture(theta[f"vblora_logits_{f}"], theta["vblora_vector_bank"], config.topk) for f in "AB")
        return A.flatten(1), B.mT.flatten(0, 1)


def last_bank(start, logits, bank, W=None):
    """PEFT draws a bank before each target's logits, and keeps the last: that one, with the generator as after the first."""
    with torch.random.fork_rng(devices=[]):
        for specs in logits:
            start(bank)
            for shape, init in specs:
                init(bank.new_empty(shape))
        start(bank)
    start(torch.empty_like(bank))


def mixture(logits, bank, k: int) -> torch.Tensor:
    """(blocks..., N) -> (blocks..., v): the k rows with the largest logits, in their proportions."""
    largest, rows = logits.topk(k, dim=-1)
    return (largest.softmax(-1).unsqueeze(-1) * bank[rows]).sum(-2)
