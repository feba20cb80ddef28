"""LoRA files with a pair of factors for each expert and projection, for models whose experts are stacked.

So transformers 4 named experts, and so inference servers want them. In a stack (E, out, in) of n former weights, whose rows
follow one another, each keeps its own update:

    A_e = [A_e1; ...; A_en]        B_e = block_diag(B_e1, ..., B_en)        (rank n r)

PEFT's keys hold them as A (E n r, in), expert after expert, and B (out, n r E), whose last axis runs over experts first.

Deviations from PEFT, which computes other numbers there: shared experts and dense layers with factors in the file keep
them; gate_up_proj without down_proj finds its key; use_rslora keeps its scale, n r being larger than r; alpha_pattern may
have former names; qwen2_moe.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch

from ..config import AdapterConfig, by_pattern
from ..errors import AdapterFileError
from ..methods import get_method
from ..planning.moe import FILE_NAMES, STACKED, converted, former, stacks, with_parameters
from ..planning.plan import PREFIX
from ..planning.selection import completed, last_parts, select
from ..planning.wrappers import BASE
from ..target import ModuleTable, Target, sizes

if TYPE_CHECKING:
    from ..methods.lora import LoRA, LoraConfig

Tensors = dict[str, torch.Tensor]

LORA = cast("LoRA", get_method("LORA"))
FACTORS = ("lora_A", "lora_B")
MODULE = re.compile(rf"{re.escape(PREFIX)}(?P<path>.+)\.lora_[AB]\.weight")
EXPERT = re.compile(r"(?P<stack>.+)\.\d+\.(?P<old>\w+)")
FORMERLY, TODAY = ".block_sparse_moe.", ".mlp."  # Mixtral's blocks
SHOWN = 10


def stacked(config: AdapterConfig, tensors: Tensors, table: ModuleTable, where: str) -> tuple[AdapterConfig, Tensors]:
    """Config and tensors with the factors of experts put into those of their stacks; as they came, for other files.

    The new config adapts what the file has. Raises AdapterFileError for factors that are missing or do not fit.
    """
    names = FILE_NAMES.get(table.model_type)
    if config.peft_type != "LORA" or not names:
        return config, tensors
    tensors = dict(tensors)
    paths = {m["path"] for m in filter(None, map(MODULE.fullmatch, tensors))}
    matches = filter(None, map(EXPERT.fullmatch, paths))
    found = {f"{m['stack']}.{names[m['old']]}" for m in matches if m["old"] in names}.intersection(stacks(table))
    new, faults = choosing(table, config, names, paths, found), []
    for target in select(table, new).targets if found else ():
        if target.tensor_name in found:
            faults += join(tensors, target, config, new, former(names, target.parameter))
    if faults:
        more = [f"... and {len(faults) - SHOWN} more"] if len(faults) > SHOWN else []
        raise AdapterFileError("\n  ".join([f"{where} does not fit this model's experts:", *faults[:SHOWN], *more]))
    return new, tensors


def choosing(
    table: ModuleTable, config: AdapterConfig, names: dict[str, str], paths: set[str], found: set[str]
) -> AdapterConfig:
    """The config that adapts the stacks `found`, and what else the file has under names of experts.

    That are routers, shared experts and dense layers. As parameters they can be chosen apart from the routed experts, in
    PEFT too. paths: modules that have factors in the file.
    """
    given, config = config, completed(table, config)
    if found:
        config = converted(table, config, lambda more: last_parts(table, config, more), names)
        config = with_parameters(table, config, names, {last_part(name) for name in found})
    adapted = {t.path for t in select(table, config).targets}
    weights = {
        f"{p}.weight"
        for p in paths - adapted
        if last_part(p) in names and p in table and "weight" in table[p].parameters
    }
    if not found and not weights:
        return given
    chosen = set(config.target_parameters or ())
    if paths.isdisjoint(p + end for name in stacks(table) for p in [name.rpartition(".")[0]] for end in ("", BASE)):
        kinds = {last_part(name) for name in found}
        whole = found == {name for name in stacks(table) if last_part(name) in kinds}
        chosen = {n for n in chosen if last_part(n) not in STACKED} | (kinds if whole else found)
    return replace(config, target_parameters=sorted(chosen | weights))


def last_part(name: str) -> str:
    return name.rpartition(".")[2]


def join(tensors: Tensors, target: Target, old: AdapterConfig, new: AdapterConfig, parts: list[str]) -> list[str]:
    """Puts a stack's factors in the place of those of its experts; what is wrong with these."""
    r, rows = LORA.rank(target, new) // len(parts), target.out_features // len(parts)
    expected = {"lora_A": (r, target.in_features), "lora_B": (rows, r)}
    keys = {
        factor: [
            [f"{PREFIX}{target.path}.{e}.{part}.{factor}.weight" for part in parts] for e in range(target.experts or 0)
        ]
        for factor in FACTORS
    }
    wanted = {key: expected[factor] for factor, experts in keys.items() for own in experts for key in own}
    faults = [f"missing: {key}" for key in wanted if key not in tensors] or [
        f"{key}: expected shape {sizes(shape)}, got {sizes(tensors[key].shape)}"
        for key, shape in wanted.items() if tensors[key].shape != shape
    ]  # fmt: skip
    if faults:
        return faults
    A, B = ([[tensors.pop(key) for key in own] for own in keys[factor]] for factor in FACTORS)
    # each part's scale over the stack's: 1, but for use_rslora and patterns
    scales = [scale_of(old, f"{target.path}.0.{part}", r) / LORA.scaling(target, new) for part in parts]
    B = [[b if s == 1 else b * s for b, s in zip(own, scales, strict=True)] for own in B]
    tensors[f"{PREFIX}{target.file_path}.lora_A.weight"] = torch.cat([a for own in A for a in own])
    diagonal = torch.stack([torch.block_diag(*own) for own in B], dim=-1)
    tensors[f"{PREFIX}{target.file_path}.lora_B.weight"] = diagonal.flatten(1)
    return []


def scale_of(config: AdapterConfig, path: str, r: int) -> float:
    """Of a module of transformers 4, with the names of today or of then in front."""
    config = cast("LoraConfig", config)
    alpha = by_pattern(config.alpha_pattern, path.replace(TODAY, FORMERLY), config.lora_alpha)
    alpha = by_pattern(config.alpha_pattern, path, alpha)
    return alpha / math.sqrt(r) if config.use_rslora else alpha / r
