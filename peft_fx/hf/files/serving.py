"""`save_for_serving`: a LoRA adapter under the names that inference servers read.

vLLM and SGLang name modules as checkpoints do. Where transformers stacks experts that a checkpoint has one by one, PEFT's
files have factors of the stack (`experts.base_layer.lora_A`), which vLLM reads for models whose checkpoints are stacked too
(else with `enable_mixed_moe_lora_format`), and SGLang not at all. Both read a pair per expert and projection:

    stack (E, out, in) = experts' rows:   A_e = A[e],   B_e = B[rows, :, e]     gate and up share A: their rows are one stack's

Neither knows rank_pattern and alpha_pattern, nor SGLang use_rslora: what a scale differs by goes into B, and all factors
get the largest rank, with zeros.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers.core_model_loading import revert_weight_conversion

from ...atomic import StrPath
from ...config import AdapterConfig
from ...engine.filing import adapter_files
from ...engine.transitions import planned
from ...errors import RecipeError
from ...files.write import write_adapter
from ...methods import get_method
from ...planning.plan import PREFIX, Placement
from ...store.state import state_of
from ...target import Target
from ..model.model import DEFAULT, PeftModel
from ..model.tuner import tuner_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ...methods.lora import LoRA, LoraConfig

# fields that servers refuse or ignore
PLAIN = {
    "use_dora": False, "lora_bias": False, "bias": "none", "modules_to_save": None, "trainable_token_indices": None,
}  # fmt: skip


def save_for_serving(model: PeftModel, folder: StrPath, adapter_name: str = DEFAULT) -> Path:
    """Writes a LoRA adapter's two files, experts apart where the model's checkpoint has them apart; returns the folder.

    PEFT reads them too. Raises RecipeError for what no server can have besides or in place of factors: merge it instead.
    """
    tuner = tuner_of(model)
    graph = tuner.backend.adapters
    config, tensors = adapter_files(graph, adapter_name)
    placements = planned(state_of(graph), adapter_name, config).placements
    refuse(config, placements)
    lora, config = cast("LoRA", get_method("LORA")), cast("LoraConfig", config)
    found: dict[str, torch.Tensor] = {}
    names = []
    rank = max(lora.rank(p.target, config) for p in placements)
    for p in placements:
        target, (name_A, name_B, suffix) = p.target, lora.names(p.target)
        E = target.experts or 1
        A, B = tensors[p.file_key(name_A)].unflatten(0, (E, -1)), tensors[p.file_key(name_B)].unflatten(1, (-1, E))
        A, B = (F.pad(factor, (0, 0, 0, rank - A.shape[1])) for factor in (A, B))
        B = B * (lora.scaling(target, config) / (config.lora_alpha / config.r))
        own = apart(tuner.model, target)
        parts = [(path, A[e], B[rows, :, e]) for path, (e, rows) in own.items()]
        for path, *factors in parts or [(target.file_path, A.flatten(0, 1), B.flatten(1))]:
            found |= {f"{PREFIX}{path}.{n}{suffix}": t for n, t in zip((name_A, name_B), factors, strict=True)}
            names.append(path.rpartition(".")[2] if parts else target.path)
    kept = () if isinstance(config.target_modules, str) else config.target_modules or ()
    names = [n for n in dict.fromkeys(names) if "." not in n or not kept]
    served = replace(
        config, target_modules=sorted({*kept, *names}), target_parameters=None, rank_pattern={}, alpha_pattern={},
        use_rslora=False, r=rank, lora_alpha=config.lora_alpha * rank / config.r,
    )  # fmt: skip
    return write_adapter(folder, served, found)


def refuse(config: AdapterConfig, placements: tuple[Placement, ...]) -> None:
    """Raises RecipeError unless the adapter is nothing but pairs of factors of matrices."""
    reasons = [] if config.peft_type == "LORA" else [f"peft_type {config.peft_type}, expected LORA"]
    reasons += [f"{k}={v!r}" for k, plain in PLAIN.items() if (v := getattr(config, k, plain) or plain) != plain]
    reasons += [f"a convolution ({p.target.name})" for p in placements if p.target.kernel][:1]
    if reasons:
        raise RecipeError(f"servers cannot apply {'; '.join(reasons)}: merge_and_unload() and serve the model")


def apart(model: nn.Module, target: Target) -> dict[str, tuple[int, torch.Tensor]]:
    """Path in the checkpoint -> (expert, its rows in the stack); {} for what is no stack, or one there too."""
    if not target.experts:
        return {}
    # transformers says which rows of the stack are which parameter of the checkpoint: it takes a stack of row numbers apart
    E, out = target.experts, target.out_features
    found = revert_weight_conversion(
        cast("PreTrainedModel", model), {target.tensor_name: torch.arange(E * out).view(E, out, 1)}
    )
    if any(numbers.dim() != 2 for numbers in found.values()):
        return {}
    return {k.removesuffix(".weight"): (int(n[0, 0]) // out, n[:, 0] % out) for k, n in found.items()}
