"""The config that a LoRA file's tensors imply, or that diffusers wrote into the file's metadata."""

from __future__ import annotations

import json
import math
from collections import Counter

import torch

from ..errors import AdapterFileError
from ..methods.shapes import factorization
from ..target import ModuleTable, sizes

Tensors = dict[str, torch.Tensor]

ALPHA = "alpha"
# fields of a config by which modules are chosen: the file's keys choose them
CHOOSING = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters")
METADATA = "lora_adapter_metadata"  # where diffusers writes the config, component by component


def inferred(
    method: str, modules: dict[str, Tensors], metadata: dict[str, str], prefixes: set[str], table: ModuleTable
) -> dict:
    """The fields of a config for `modules`: path -> tensors by PEFT's names, and alphas.

    prefixes: how the keys of these modules begin in the file, and in its metadata. A module's scale is alpha / r, and 1
    where nothing gives an alpha. Raises AdapterFileError.
    """
    alphas = {path: number(path, found[ALPHA]) for path, found in modules.items() if ALPHA in found}
    written = config_in(metadata, prefixes)
    if written and alphas:
        raise AdapterFileError(f"has scales twice: as tensors, and in the metadata {METADATA!r}")
    if not written:
        ranks: dict[str, float] = {path: rank_of(path, found) for path, found in modules.items()}
        r, rank_pattern = with_pattern(ranks)
        alpha, alpha_pattern = with_pattern(
            {path: alphas.get(path, r) if scaled(modules[path]) else r for path, r in ranks.items()}
        )
        name = "lora_alpha" if method == "LORA" else "alpha"
        written = {"r": r, "rank_pattern": rank_pattern, name: alpha, "alpha_pattern": alpha_pattern}
        written |= FIELDS[method](modules)
    return {**written, "peft_type": method, **chosen(list(modules), table)}


def scaled(found: Tensors) -> bool:
    """LyCORIS does not scale LoKr's product of two whole factors."""
    return not {"lokr_w1", "lokr_w2"} <= found.keys()


def number(path: str, alpha: torch.Tensor) -> float:
    if alpha.numel() != 1 or alpha.is_complex() or not math.isfinite(value := alpha.item()):
        raise AdapterFileError(
            f"{path}: expected alpha to be one finite number, got {alpha.flatten()[:3].tolist()} of shape {sizes(alpha.shape)}"
        )
    return int(value) if value == int(value) else value


def rank_of(path: str, found: Tensors) -> int:
    """The size of the axis that the factors share; of LoKr's whole factors, a rank with which they stay whole."""
    for name, axis in (("lora_A.weight", 0), ("hada_w1_b", 0), ("lokr_w2_b", 0), ("lokr_w1_b", 0)):
        if name in found and found[name].dim() > axis:
            return len(found[name])
    if "lokr_w2" in found and found["lokr_w2"].dim() > 1:
        return max(found["lokr_w2"].shape[:2])
    raise AdapterFileError(f"{path}: has {', '.join(found) or 'an alpha'}, no factor that tells the rank")


def with_pattern(values: dict[str, float]) -> tuple[float, dict[str, float]]:
    """The most common value, and a pattern for each other one that matches its modules alone.

    Files have hundreds of modules, and looking up a target's value tries pattern after pattern: hence one per value.
    """
    common = Counter(values.values()).most_common(1)[0][0]
    others = {
        value: one_of([p for p, v in values.items() if v == value]) for value in values.values() if value != common
    }
    return common, {f"^({pattern})": value for value, pattern in others.items()}


def one_of(paths: list[str]) -> str:
    return "|".join(path.replace(".", r"\.") for path in sorted(paths))


def chosen(paths: list[str], table: ModuleTable) -> dict:
    """Fields that choose these modules and no others: their list, or a regex if a path is the end of another one's."""
    ends = {other.partition(".")[2] for other in table.by_path}
    while longer := {end.partition(".")[2] for end in ends} - ends:
        ends |= longer
    targets = sorted(paths) if ends.isdisjoint(paths) else one_of(paths)
    return {**dict.fromkeys(CHOOSING), "target_modules": targets}


def lora_fields(modules: dict[str, Tensors]) -> dict:
    has = {name for found in modules.values() for name in found}
    return {"use_dora": "lora_magnitude_vector" in has, "lora_bias": "lora_B.bias" in has}


def loha_fields(modules: dict[str, Tensors]) -> dict:
    return {"use_effective_conv2d": any("hada_t1" in found for found in modules.values())}


def lokr_fields(modules: dict[str, Tensors]) -> dict:
    """The config has one decompose_factor: that with which all modules' sizes fall apart as they do in the file."""
    pairs = {pair for found in modules.values() for pair in kronecker_sizes(found)}
    factors = [-1, *sorted({size for pair in pairs for size in pair})]
    factor = next((f for f in factors if all(factorization(m * n, f) == (m, n) for m, n in pairs)), None)
    if factor is None:
        raise AdapterFileError(f"no decompose_factor gives the sizes of all of its Kronecker factors: {sorted(pairs)}")
    has = {name for found in modules.values() for name in found}
    return {"decompose_factor": factor, "decompose_both": "lokr_w1_a" in has, "use_effective_conv2d": "lokr_t2" in has}


def kronecker_sizes(found: Tensors) -> list[tuple[int, int]]:
    """How the numbers of output and of input features are products; [] where tensors are missing, which is seen later."""
    core = "lokr_t2" in found
    sizes = []
    for i in "12":
        whole, a, b = (found.get(f"lokr_w{i}{end}") for end in ("", "_a", "_b"))
        if whole is not None and whole.dim() > 1:
            sizes.append(tuple(whole.shape[:2]))
        elif a is not None and b is not None and a.dim() == b.dim() == 2:
            sizes.append((a.shape[1] if core and i == "2" else a.shape[0], b.shape[1]))
        else:
            return []
    return list(zip(*sizes, strict=True))


FIELDS = {"LORA": lora_fields, "LOHA": loha_fields, "LOKR": lokr_fields}


def config_in(metadata: dict[str, str], prefixes: set[str]) -> dict:
    """The config that diffusers wrote into the file for a component, {} if there is none."""
    try:
        data = json.loads(metadata.get(METADATA, "{}"))
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"metadata {METADATA!r} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise AdapterFileError(f"metadata {METADATA!r}: expected a JSON object, got {type(data).__name__}")
    own = {k.removeprefix(p): v for p in prefixes for k, v in data.items() if k.startswith(p)}
    return {k: v for k, v in own.items() if "." not in k and k != "peft_type"}
