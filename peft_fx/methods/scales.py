"""Rank and scale of an update: the config's, unless a pattern matches the target's path."""

from __future__ import annotations

import math
from functools import partial
from typing import ClassVar

from ..config import by_pattern
from .base import Tensor
from .inits import constant


def fixed(value: float) -> Tensor:
    """A number of the config's, as a tensor, so that a swap changes it in place."""
    return Tensor((), partial(constant, value), trainable=False, derived=True)


class Ranked:
    """For methods whose config has r, alpha and their patterns."""

    alpha: ClassVar[str] = "alpha"  # the field of the config with alpha

    def rank(self, target, config) -> int:
        return by_pattern(config.rank_pattern, target.pattern_path, config.r)

    def scaling(self, target, config) -> float:
        """alpha / r, or alpha / sqrt(r) with use_rslora."""
        alpha = by_pattern(config.alpha_pattern, target.pattern_path, getattr(config, self.alpha))
        r = self.rank(target, config)
        return alpha / math.sqrt(r) if getattr(config, "use_rslora", False) else alpha / r
