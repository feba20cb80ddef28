"""Fields of AdaMSS's config that say how its allocator masks subspaces while training: peft_fx.training.adamss reads them."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import AdapterConfig
from ..errors import RecipeError
from ..fields import nonnegative, positive, probability, rank


@dataclass
class AsaFields(AdapterConfig):
    use_asa: bool = False
    asa_target_subspaces: int = rank(50)
    init_warmup: int = nonnegative(50)
    final_warmup: int = nonnegative(1000)
    mask_interval: int = rank(100)
    asa_importance_beta: float = probability(0.85)
    asa_uncertainty_beta: float = probability(0.85)
    asa_schedule_exponent: float = positive(3.0)

    def __post_init__(self):
        super().__post_init__()
        if self.use_asa and self.init_warmup >= self.final_warmup:
            raise RecipeError(f"init_warmup={self.init_warmup}: expected less than final_warmup={self.final_warmup}")
