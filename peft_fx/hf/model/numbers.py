"""Numbers from files into adapters: what fits is taken, and what does not is named in a warning and returned, as in PEFT."""

from __future__ import annotations

import torch
from torch.nn.modules.module import _IncompatibleKeys

from ...config import AdapterConfig
from ...engine.filing import adapter_files
from ...engine.trainable import refuse_part
from ...engine.transitions import planned
from ...files.match import SHOWN, misfits
from ...notices import warn
from ...store.state import state_of
from ..compat.constants import PeftWarning
from .tuner import Tuner


def reported(tuner: Tuner, adapter: str, tensors: dict[str, torch.Tensor], where: str) -> _IncompatibleKeys:
    """The keys that a resident adapter has and a file has not, those that only the file has; a warning names both."""
    gm = tuner.backend.adapters
    state = state_of(gm)
    missing, unexpected = misfits(planned(state, adapter, state.recipe[adapter].config), tensors)
    return warned(_IncompatibleKeys(missing, sorted(unexpected)), adapter, where)


def warned(result: _IncompatibleKeys, adapter: str, where: str) -> _IncompatibleKeys:
    lines = [
        f"{does}: {', '.join(keys[:SHOWN])}" + (f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else "")
        for does, keys in (("missing, which stay as they were or start anew", result.missing_keys),
                           ("left out, since the adapter has no such tensors", result.unexpected_keys))
        if keys
    ]  # fmt: skip
    if lines:
        warn("\n  ".join([f"{where} does not fit adapter {adapter!r} in all its keys:", *lines]), PeftWarning)
    return result


def rewritten(
    tuner: Tuner, adapter: str, config: AdapterConfig, tensors: dict[str, torch.Tensor], trainable: bool
) -> None:
    """A resident adapter gets a file's config and numbers; what the file has no tensors for keeps its own.

    Raises AdapterFileError where nothing of the file is this adapter's, or where it is not whole and is to be trained.
    """
    if trainable:
        refuse_part(config, "the file")
    gm = tuner.backend.adapters
    plan = planned(state_of(gm), adapter, config)
    missing, unexpected = misfits(plan, tensors)
    wanted = {key for _, _, keys in plan.filed for key in keys}
    if wanted & tensors.keys() and (missing or unexpected):
        kept = adapter_files(gm, adapter)[1]
        tensors = {k: kept[k] for k in missing if k in kept} | {k: t for k, t in tensors.items() if k in wanted}
    tuner.hotswap((config, tensors), adapter)
