"""Small helpers of PEFT's, by its names, that are about one thing each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ...atomic import StrPath
from ...config import AdapterConfig
from ...errors import PeftFxError
from ...files.read import read_config
from ...recipe import as_config
from ...store.tensors import store_of
from ...verbs.backend import Backend
from ...verbs.tensors import FACTORS, Owned, adapters_of, tensors_of


def check_if_peft_model(model_name_or_path: StrPath) -> bool:
    """Whether a folder or Hub repository holds an adapter that can be read."""
    try:
        read_config(model_name_or_path)
    except PeftFxError:
        return False
    return True


def get_peft_config(config_dict: dict) -> AdapterConfig:
    """The config that a dict with a peft_type describes. Raises RecipeError."""
    return as_config(config_dict)


@contextmanager
def rescale_adapter_scale(model: nn.Module | Backend, multiplier: float) -> Iterator[None]:
    """Inside the block LoRA's updates count `multiplier` times; afterwards the scales have the bits that they had.

    model: a PeftModel, a graph or a backend. The scales are tensors, so nothing is compiled again; backward through a call
    from inside the block has to be inside too. Weights with merged adapters stay as they are.
    Raises ValueError where no adapter has LoRA's factors.
    """
    if not isinstance(multiplier, (int, float)):
        raise TypeError(f"multiplier: expected a number, got {type(multiplier).__name__}")
    tensors = [s.tensor for s in scales(model)]
    if not tensors:
        raise ValueError("only LoRA's updates have a scale to change, and this model has no LoRA adapter")
    sharing = store_of(adapters_of(model)).sharing
    before = {t: t.clone() for t in tensors}
    sharing.put({t: t * multiplier for t in tensors})
    try:
        yield
    finally:
        sharing.put(before)


def scales(model: nn.Module | Backend) -> list[Owned]:
    """What LoRA's updates are multiplied by."""
    first = {a for a, _ in FACTORS}
    return [t for t in tensors_of(model) if t.name == "scaling" and first & t.placement.tensors.keys()]


@contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """Changes nothing: inputs are never cast here, factors take the input's dtype."""
    yield


class DoraCaching:
    """Changes nothing: DoRA's norms are computed in every call. What saves them in inference is to merge the adapter."""

    def __init__(self, enabled: bool = True):
        self.enabled = enabled

    def __call__(self, enabled: bool = True) -> None:
        """For good, not for a block."""

    def __enter__(self) -> None:
        """Nothing to switch on."""

    def __exit__(self, *error: object) -> None:
        """Nor off."""


def shift_tokens_right(input_ids: torch.Tensor, pad_token_id: int, decoder_start_token_id: int) -> torch.Tensor:
    """A decoder's inputs from its labels: one place later, the start token first, -100 as padding."""
    if pad_token_id is None:
        raise ValueError("pad_token_id is None: give the model's config one")
    start = torch.full_like(input_ids[:, :1], decoder_start_token_id)
    shifted = torch.cat([start, input_ids[:, :-1]], dim=1)
    return shifted.masked_fill(shifted == -100, pad_token_id)
