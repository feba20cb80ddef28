"""LoRA+ (Hayou et al. 2024, arXiv 2402.12354): B learns faster than A.

    lr                          A, and matrices that are no factor of LoRA's
    lr * loraplus_lr_ratio      B, biases, vectors; those of layer norms and biases without weight decay
    loraplus_lr_embedding       both factors of embeddings

Groups and defaults are PEFT's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from ..store.state import state_of
from ..target import ModuleRecord, ModuleTable
from ..verbs.tensors import Owned, adapters_of, parameters_of

EIGHT_BIT = ("Adam8bit", "AdamW8bit", "PagedAdam8bit", "PagedAdamW8bit")


def create_loraplus_optimizer(model: Any, optimizer_cls: type[Optimizer], *, lr: float, loraplus_lr_ratio: float,
                              loraplus_weight_decay: float = 0.0, loraplus_lr_embedding: float = 1e-6,
                              **options: Any) -> Optimizer:  # fmt: skip
    """An optimiser of that class for what trains in a PeftModel, a graph or a backend. options: its further arguments."""
    table = state_of(adapters_of(model)).table
    owned = [t for t in parameters_of(model) if t.tensor.requires_grad]
    groups: dict[str, list[torch.Tensor]] = {role: [] for role in ("others", "embedding", "B", "B_no_decay")}
    for t in owned:
        groups[role(t, table)].append(t.tensor)
    rates = {"others": lr, "embedding": loraplus_lr_embedding, "B": lr * loraplus_lr_ratio}
    if optimizer_cls.__name__ in EIGHT_BIT:
        keep_32_bits([t for t in owned if t.placement.method == "SAVED" and record_of(t, table).is_a("Embedding")])
    make: Callable[..., Optimizer] = optimizer_cls
    return make(
        [
            {"params": parameters, "weight_decay": 0.0 if name == "B_no_decay" else loraplus_weight_decay,
             "lr": rates.get(name, rates["B"])}
            for name, parameters in groups.items()
        ],
        lr=lr, **options,
    )  # fmt: skip


def record_of(t: Owned, table: ModuleTable) -> ModuleRecord:
    """The module that the parameter is for."""
    return table[t.placement.target.path]


def role(t: Owned, table: ModuleTable) -> str:
    """The group of a parameter."""
    if t.name in ("lora_embedding_A", "lora_embedding_B"):
        return "embedding"
    if t.name.startswith("lora_B") or t.tensor.dim() == 1:
        kept = "bias" in t.path or record_of(t, table).is_a("LayerNorm")
        return "B_no_decay" if kept else "B"
    return "others"


def keep_32_bits(owned: list[Owned]) -> None:
    """bitsandbytes keeps the optimiser's state of whole embeddings in 32 bits."""
    import bitsandbytes  # whoever gave one of its classes has it

    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    manager.override_config([t.tensor for t in owned], "optim_bits", 32)
