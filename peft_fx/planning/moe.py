"""Mixtures of experts, whose weights transformers 5 stacks: LoRA configs that name them as transformers 4 did.

    transformers 4   experts.0.w1, experts.0.w3, ..., gate (modules)     gate_proj, up_proj, down_proj in most models
    transformers 5   experts.gate_up_proj, experts.down_proj, gate.weight (parameters)

A stack that holds two of the former weights gets twice the rank and alpha, so that a pair of factors for each fits in.
PEFT's rules and its list of models. So a name means the routed experts alone: shared experts and dense layers that have
projections of the same names are left out (name `shared_expert.up_proj.weight` in target_parameters).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from ..config import AdapterConfig, by_pattern
from ..errors import RecipeError
from ..target import ModuleTable

if TYPE_CHECKING:
    from ..methods.lora import LoraConfig

# a module of transformers 4 -> the parameter that holds its weight; of a stack's former names the first comes first in it
MIXTRAL = {"gate": "gate.weight", "w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj"}
QWEN = {"gate": "gate.weight", "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj"}
# model type -> those names; transformers' _MODEL_TO_CONVERSION_PATTERN, and mixtral
NAMES: dict[str | None, dict[str, str]] = {
    model: names
    for names, models in (
        (MIXTRAL, "mixtral minimax minimax_m2"),
        (
            QWEN,
            "afmoe deepseek_v2 deepseek_v3 deepseek_v32 dots1 ernie4_5_moe glm4_moe glm4_moe_lite glm_moe_dsa glm4v_moe "
            "longcat_flash solar_open mellum qwen3_moe beam qwen3_omni_moe qwen3_omni_moe_thinker qwen3_omni_moe_text "
            "qwen3_next hunyuan_v1_moe flex_olmo olmoe exaone_moe cohere2_moe",
        ),
    )
    for model in models.split()
}
# PEFT leaves configs of qwen2_moe as they are, since that list has no entry for the type after which it is named
FILE_NAMES = {**NAMES, "qwen2_moe": QWEN}

STACKED = ("gate_up_proj", "down_proj")


def stacks(table: ModuleTable) -> list[str]:
    """The stacks of experts in a model, full names."""
    return [f"{r.path}.{n}" for r in table.records for n in STACKED if len(r.parameters.get(n, ())) == 3]


def former(names: dict[str, str], parameter: str) -> list[str]:
    """The modules of transformers 4 whose weights a parameter holds, in its order."""
    return [old for old, new in names.items() if new == parameter]


def converted(
    table: ModuleTable,
    config: AdapterConfig,
    resolve: Callable[[Iterable[str]], set[str]],
    names: dict[str, str] | None,
) -> AdapterConfig:
    """The config with target_parameters where target_modules has former names, if the model has such stacks.

    resolve: the last parts of the module paths, and of those given, that a target_modules string chooses. names: one of
    the tables above. Raises RecipeError where one of two weights in a stack is named without the other.
    """
    if config.peft_type != "LORA" or not names or not config.target_modules or not stacks(table):
        return config
    entries: Iterable[str] = config.target_modules
    if isinstance(entries, str):
        every = [f"{r.path}.{name}" for r in table.records for name in r.parameters]
        # paths that were, as the pattern may have them: the former name in the place of the parameter's
        places = {new: [p.removesuffix(new) for p in every if p.endswith(f".{new}")] for new in names.values()}
        entries = resolve(place + old for old, new in names.items() for place in places[new])
    found = {e: next((old for old in names if f".{e}".endswith(f".{old}")), None) for e in sorted(entries)}
    named = set(filter(None, found.values()))
    if not named:
        return config
    for parameter in STACKED:
        wanted = set(former(names, parameter))
        if 0 < len(wanted & named) < len(wanted):
            present, missing = ", ".join(sorted(wanted & named)), ", ".join(sorted(wanted - named))
            raise RecipeError(
                f"Cannot convert PEFT target(s) {present} without also targeting {missing} because they are fused into "
                f"{parameter}."
            )
    config = replace(config, target_modules=[e for e, old in found.items() if old is None])
    return with_parameters(table, config, names, {names[old] for old in named})


def with_parameters(
    table: ModuleTable, config: AdapterConfig, names: dict[str, str], parameters: set[str]
) -> AdapterConfig:
    """The config that adapts these parameters too, with the rank and alpha of all that they hold.

    Where the config's own patterns say another rank or alpha for all of a model's stacks, they alone remain: PEFT adds its
    pattern behind them, and its file, which sorts them, puts it before.
    """
    config = cast("LoraConfig", config)
    ranks, alphas = dict(config.rank_pattern or {}), dict(config.alpha_pattern or {})
    for parameter in sorted(parameters):
        count = len(former(names, parameter))
        places = [name for name in stacks(table) if name.endswith(f".{parameter}")]
        for pattern, value in ((ranks, config.r), (alphas, config.lora_alpha)):
            if count > 1 and not all(by_pattern(pattern, place, None) is not None for place in places):
                pattern[rf".*\.{re.escape(parameter)}"] = value * count
    chosen = sorted({*(config.target_parameters or ()), *parameters})
    return replace(config, target_parameters=chosen, rank_pattern=ranks, alpha_pattern=alphas)
