"""IA3: Infused Adapter by Inhibiting and Amplifying Inner Activations (Liu et al. 2022, arXiv 2205.05638).

    y = l * (W x + b)          l: one factor per output feature; scales rows of W and the bias
    y = W (l * x) + b          feed-forward modules: one factor per input feature; scales columns of W

Starts as the identity (l = 1). PEFT matches feedforward_modules without regard to component borders ("lin0" also flags
"xlin0"); here an entry is a module name, a dotted suffix or a regex, as in target_modules.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial

from ..config import LORA_ONLY, AdapterConfig
from ..errors import RecipeError
from .base import InputMap, OutputMap, Tensor
from .inits import drawn_over, normal, ones


@dataclass
class IA3Config(AdapterConfig):
    peft_type = "IA3"
    absent = LORA_ONLY | {"bias", "layers_pattern", "layers_to_transform"}

    feedforward_modules: list[str] | str | None = None
    fan_in_fan_out: bool = False
    init_ia3_weights: bool = True

    def __post_init__(self):
        super().__post_init__()
        inner, targets = self.feedforward_modules, self.target_modules
        if isinstance(inner, list) and isinstance(targets, set) and (extra := set(inner) - targets):
            raise RecipeError(f"feedforward_modules: {sorted(extra)} are not in target_modules {targets}")

    def feeds_forward(self, path: str) -> bool:
        names = self.feedforward_modules or ()
        if isinstance(names, str):
            return re.fullmatch(names, path) is not None
        return any(path == n or path.endswith(f".{n}") for n in names)


class IA3(OutputMap):
    name = "IA3"
    Config = IA3Config
    refuses = {"norm": "IA3 scales the features of a product; a norm's weight does that already"}

    def at(self, target, config):
        return IA3Input() if config.feeds_forward(target.path) else self

    def tensors(self, target, config):
        return {"ia3_l": factors((target.out_features, 1), target, config)}

    def map_output(self, y, theta, target, config):
        return y * theta["ia3_l"].flatten()


class IA3Input(InputMap):
    name = "IA3_INPUT"
    Config = IA3Config
    refuses = IA3.refuses

    def tensors(self, target, config):
        return {"ia3_l": factors((1, target.in_features), target, config)}

    def map_input(self, x, theta, target, config):
        return x * theta["ia3_l"].flatten()

    def weight(self, W, b, theta, target, config):  # of convolutions the channels are scaled, not the patch
        scale = theta["ia3_l"].reshape(target.groups, 1, -1, *(1,) * len(target.kernel))
        return (W.unflatten(0, (target.groups, -1)) * scale).flatten(0, 1), b  # row block g reads channels of group g


def factors(shape: tuple[int, int], target, config) -> Tensor:
    """One axis counts; on convolutions PEFT files (1, features, 1, ...)."""
    filed = (1, max(shape), *(1,) * len(target.kernel)) if target.kernel else shape
    return Tensor(filed, partial(drawn_over, normal, ones) if config.init_ia3_weights else normal, "ia3_l")
