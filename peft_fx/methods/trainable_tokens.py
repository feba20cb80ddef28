"""Trainable tokens: chosen rows of an embedding become the adapter's own (no paper; PEFT's TRAINABLE_TOKENS).

    W'[token_indices] = trainable_tokens_delta        stored W: (V, d); delta: (k, d), new rows despite its name

Starts as the model's own rows; init_weights=False draws them from N(0, 1). A head tied to the embedding uses the same rows.
Without target_modules it is the model's input embedding.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from ..config import LORA_ONLY, AdapterConfig
from .inits import normal
from .substitute import Tokens

HOLDERS = {("embedding", True), ("linear", False)}  # (kind, stored transposed) of what has a row per token


@dataclass
class TrainableTokensConfig(AdapterConfig):
    peft_type = "TRAINABLE_TOKENS"
    absent = LORA_ONLY | {"bias", "exclude_modules", "layers_pattern", "layers_to_transform", "modules_to_save"}
    refused = {"trainable_token_indices": "this method has token_indices"}

    token_indices: list[int] = field(default_factory=list)
    init_weights: bool = True
    ensure_weight_tying: bool = True

    def fallback_targets(self, table):
        return [table.input_embedding or "embed_tokens"]


class TrainableTokens(Tokens):
    name = "TRAINABLE_TOKENS"
    Config = TrainableTokensConfig
    refuses = {"expert": "trained tokens need an embedding or a Linear head; experts have no row per token"}

    def check(self, target, config):
        if (target.kind, target.transposed) not in HOLDERS:
            return f"trained tokens need an embedding or a Linear head, not kind {target.kind}"
        ids, size = config.token_indices, target.in_features if target.transposed else target.out_features
        if not ids or len(set(ids)) != len(ids):
            return f"token_indices={ids}: expected at least one token, each once"
        outside = [i for i in ids if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < size]
        if outside:
            return f"token_indices: {outside[:5]} lie outside its {size} tokens; resize the embedding first"
        return None

    def own_rows(self, target, config):
        return config.token_indices

    def tensors(self, target, config):
        named = replace(config, token_indices=[])
        named.trainable_token_indices = config.token_indices
        spec = super().tensors(target, named)
        rows = replace(spec["trainable_tokens_delta"], key="trainable_tokens_delta")
        rows = rows if config.init_weights else replace(rows, init=normal)
        return spec | {"trainable_tokens_delta": rows}

    def tied(self, target, source, config):
        return {name: (name, False) for name in ("trainable_tokens_delta", "ids")}
