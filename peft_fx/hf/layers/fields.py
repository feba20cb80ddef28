"""What the configs say of one module, by adapter: `r`, `lora_alpha`, `use_dora`, ... as PEFT's layers have them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, cast

from torch import nn

from ...config import AdapterConfig, by_pattern
from ...methods.scales import Ranked
from ...planning.plan import Placement
from ..hosts.dropout import InputDropout
from .containers import fixed_dict
from .layer import Layer

# fields that PEFT's layers keep by adapter, besides the method's alpha and dropout
KEPT = frozenset({
    "r", "alpha", "use_dora", "use_rslora", "lora_bias", "hybrid_r", "gralora_k", "topk", "block_size", "rank_dropout",
    "rank_dropout_scale", "module_dropout", "boft_block_size", "boft_block_num", "oft_block_size", "num_B", "stride_A", "depth",
    "sample_at_inference", "n_frequency", "random_loc_seed", "apply_GS", "mini_r", "rank", "variant", "group_size",
    "num_subspaces", "token_indices", "act_fn",
})  # fmt: skip
CHOICES = frozenset({"r", "boft_block_size", "boft_block_num", "oft_block_size"})  # 0: the other one of two says it


def names(config: type[AdapterConfig]) -> list[str]:
    """The fields that a layer shows."""
    return [f.name for f in dataclasses.fields(config) if f.name in KEPT or f.name.endswith(("_alpha", "_dropout"))]


def value(p: Placement, name: str) -> Any:
    """Patterns for the module's path included."""
    method, config = p.rule, cast(Any, p.config)  # its class depends on the method
    if isinstance(method, Ranked) and name == "r":
        return method.rank(p.target, config)
    if isinstance(method, Ranked) and name == method.alpha:
        return by_pattern(config.alpha_pattern, p.target.pattern_path, getattr(config, name))
    return getattr(config, name)


def by_adapter(layer: Layer, name: str) -> nn.ModuleDict | Mapping[str, Any]:
    """Adapter -> the field; dropout as modules, which set the config where their `p` is set."""
    placed = [p for adapter in layer.placed for p in layer.updates(adapter)[:1] if hasattr(p.config, name)]
    found = {p.adapter: p for p in placed if name not in CHOICES or value(p, name)}
    if any(p.rule.drops == name for p in found.values()):
        dropouts = {d.adapter: d for d in cast(Iterable[InputDropout], layer.tuner.dropouts)}
        return fixed_dict(nn.ModuleDict, {adapter: dropouts.get(adapter, nn.Identity()) for adapter in found})
    return MappingProxyType({adapter: value(p, name) for adapter, p in found.items()})
