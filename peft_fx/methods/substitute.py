"""Substitutions: the adapter brings the numbers itself instead of an update to the model's.

    Saved     W' = weight                           modules_to_save, trained biases; buffers are copied, not trained
    Tokens    W'[:, ids] = trainable_tokens_deltaᵀ   rows of an embedding; W: (d, V) for embeddings, (V, d) for heads

`trainable_tokens_delta` is PEFT's name: it holds the new rows, not differences. Both start as the model's own numbers.
Copies have the model's dtype, as in PEFT: statistics that training writes in place need it, and a head keeps its size.
"""

from __future__ import annotations

from functools import partial

import torch

from .base import Substitute, Tensor
from .inits import copy_base


class Saved(Substitute):
    name = "SAVED"

    def own_rows(self, target, config):
        return range(target.shape[0]) if target.shape else (0,)

    def tensors(self, target, config):
        return {"weight": Tensor(target.shape, copy_base, key=target.parameter, like_base=True)}

    def weight(self, W, b, theta, target, config):
        return theta["weight"].to(W.dtype), b


class Tokens(Substitute):
    name = "TOKENS"
    one_size = "rows of zeros would need token ids of their own"

    def own_rows(self, target, config):
        return token_ids(target, config)

    def tensors(self, target, config):
        ids = token_ids(target, config)
        return {
            "trainable_tokens_delta": Tensor(
                (len(ids), target.out_features if target.transposed else target.in_features),
                partial(copy_rows, ids, token_axis(target)),
                key="token_adapter.trainable_tokens_delta",
            ),
            "ids": Tensor((len(ids),), partial(copy_values, ids), trainable=False, dtype=torch.int64, derived=True),
        }

    def weight(self, W, b, theta, target, config):
        rows = theta["trainable_tokens_delta"].to(W.dtype)
        axis = token_axis(target)
        return W.index_copy(axis, theta["ids"], rows.mT if axis == -1 else rows), b


def token_axis(target) -> int:
    """The vocabulary's axis of the canonical weight: stored (V, d) either way, embeddings are seen transposed."""
    return -1 if target.transposed else -2


def token_ids(target, config) -> list[int]:
    """The ids that `trainable_token_indices` gives for this module."""
    wanted = config.trainable_token_indices
    if not isinstance(wanted, dict):
        return wanted
    return next(ids for name, ids in wanted.items() if target.path == name or target.path.endswith(f".{name}"))


# Initialisers: (empty tensor, base weight in canonical layout) -> None, in place.


def copy_rows(ids, axis, tensor, W):
    rows = W.index_select(axis, torch.tensor(ids, device=W.device))
    tensor.copy_(rows.mT if axis == -1 else rows)


def copy_values(ids, tensor, W=None):
    tensor.copy_(torch.tensor(ids))
