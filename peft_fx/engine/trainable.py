"""Whether the numbers that an adapter has can be trained on."""

from __future__ import annotations

from torch import fx

from ..config import AdapterConfig
from ..errors import AdapterFileError
from ..store.state import state_of
from ..store.tensors import ADAPTERS, tensor_of


def refuse_part(config: AdapterConfig, where: str) -> None:
    """Raises AdapterFileError for a file to train on that holds a part of its adapter."""
    if why := config.part_only():
        raise AdapterFileError(f"{where}: {why}: load it for inference alone, or save the whole adapter to train on")


def untrainable(gm: fx.GraphModule, adapter: str) -> str:
    """Why an adapter cannot be trained on, "" for one that can: its file held a part of it, and infinite numbers for the rest."""
    for p in state_of(gm).recipe[adapter].placements:
        if why := p.config.part_only():
            tensors = [
                tensor_of(gm, f"{ADAPTERS}.{p.resolve(n).name}") for n, spec in p.tensors.items() if spec.trainable
            ]
            if not all(t.isfinite().all() for t in tensors):
                return why
    return ""
