"""IA3: Infused Adapter by Inhibiting and Amplifying Inner Activations (Liu et al. 2022, arXiv 2205.05638).

    y = l * (W x + b)          l: one factor per output feature; scales rows of W and the bias
    y = W (l * x) + b          feed-forward modules: one factor per input feature; scales columns of W

Starts as the identity (l = 1). PEFT matches feedforward_modules without regard to component borders ("lin0" also flags
"xlin0"); here an entry is a module name, a dotted suffix or a regex, as in target_modules.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..config import LORA_ONLY, AdapterConfig
from ..errors import RecipeError
from .base import InputMap, OutputMap, Tensor
from .inits import normal, ones


@dataclass(frozen=True)
class IA3Config(AdapterConfig):
    peft_type = "IA3"
    absent = LORA_ONLY | {"bias", "layers_pattern", "layers_to_transform"}

    feedforward_modules: list[str] | str | None = None
    fan_in_fan_out: bool = False
    init_ia3_weights: bool = True

    def __post_init__(self):
        super().__post_init__()
        inner, targets = self.feedforward_modules, self.target_modules
        if isinstance(inner, list) and isinstance(targets, list) and (extra := set(inner) - set(targets)):
            raise RecipeError(f"feedforward_modules: {sorted(extra)} are not in target_modules {targets}")


def feeds_forward(path: str, config: IA3Config) -> bool:
    names = config.feedforward_modules or ()
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == n or path.endswith(f".{n}") for n in names)


class IA3(OutputMap):
    name = "IA3"
    refuses = {"norm": "IA3 scales the features of a product; a norm's weight does that already"}
    Config = IA3Config

    def at(self, target, config):
        return IA3Input() if feeds_forward(target.path, config) else self

    def tensors(self, target, config):
        return {"ia3_l": Tensor(shape_of(target, target.out_features, axis=0), start(config), "ia3_l")}

    def map_output(self, y, theta, target, config):
        return y * theta["ia3_l"].flatten()


class IA3Input(InputMap):
    name = "IA3_INPUT"
    Config = IA3Config
    refuses = IA3.refuses

    def tensors(self, target, config):
        return {"ia3_l": Tensor(shape_of(target, target.in_features, axis=1), start(config), "ia3_l")}

    def map_input(self, x, theta, target, config):
        return x * theta["ia3_l"].flatten()

    def weight(self, W, b, theta, target, config):  # channels, not patches, are scaled on convolutions
        scale = theta["ia3_l"].flatten()
        if target.groups > 1:  # row block g reads the g-th part of the channels
            scale = scale.unflatten(0, (target.groups, -1)).repeat_interleave(W.shape[0] // target.groups, 0)
            return W * scale.reshape(*scale.shape, *(1,) * len(target.kernel)), b
        return W * scale.reshape(-1, *(1,) * len(target.kernel)), b


def shape_of(target, size: int, axis: int) -> tuple[int, ...]:
    """PEFT's shapes: (m, 1) and (1, n) on matrices, (1, c, 1, ...) on convolutions."""
    if target.kernel:
        return (1, size, *(1,) * len(target.kernel))
    return (size, 1) if axis == 0 else (1, size)


def start(config):
    return ones if config.init_ia3_weights else normal
