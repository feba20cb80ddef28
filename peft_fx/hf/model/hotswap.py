"""Swapping adapters in a PeftModel: into the tensors that there are, or, where nothing is compiled, into larger ones."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...atomic import StrPath
from ...config import AdapterConfig
from ...engine.swaps import SwapReport
from ...engine.widening import widened
from ...errors import HotswapError
from ...files.read import read_adapter
from ...notices import warn
from ...planning.plan import PREFIX
from ...recipe import as_config
from ...store.unwrap import is_compiled, unwrapped
from .injection import injected
from .tuner import Tuner, tuner_of


def hotswap_adapter(model: nn.Module, model_name_or_path: StrPath, adapter_name: str, torch_device: str | None = None,
                    **kwargs: Any) -> SwapReport:  # fmt: skip
    """Another adapter's numbers, of any method that the resident one has, in its place: nothing is compiled again.

    Of a model that is not compiled an adapter gets wider tensors where the new rank is larger: new Parameters.
    """
    return swapped(model, model_name_or_path, adapter_name)


def hotswap_adapter_from_state_dict(model: nn.Module, state_dict: dict, adapter_name: str, config: Any,
                                    parameter_prefix: str = "") -> SwapReport:  # fmt: skip
    """`hotswap_adapter` from memory. Scales follow the config, its patterns included. Keys may name the adapter."""
    named = {without(key, adapter_name): tensor for key, tensor in state_dict.items()}
    if injected(unwrapped(model)) is not None:
        named = {PREFIX + key.removeprefix(PREFIX): tensor for key, tensor in named.items()}
    return swapped(model, (as_config(config), named), adapter_name)


def without(key: str, adapter: str) -> str:
    """A tensor's key in files, from the one that PEFT's layers have: ...lora_A.<adapter>.weight."""
    parts = key.split(".")
    place = next((i for i in (len(parts) - 1, len(parts) - 2) if parts[i] == adapter), None)
    return key if place is None else ".".join(parts[:place] + parts[place + 1 :])


def swapped(model: nn.Module, source: StrPath | tuple[AdapterConfig, dict], name: str) -> SwapReport:
    """Raises HotswapError, and has changed nothing, for what does not fit."""
    tuner = tuner_of(model)
    try:
        return tuner.hotswap(source, name)
    except HotswapError:
        rank = wanted_rank(tuner, source)
        if rank is None or is_compiled(model):
            raise
        with tuner.changing():
            before = tuner.backend.adapters
            try:
                widen(tuner, rank)
                return tuner.hotswap(source, name)
            except BaseException:
                tuner.backend.keep(before)
                tuner.refresh()
                raise


def wanted_rank(tuner: Tuner, source: StrPath | tuple[AdapterConfig, dict]) -> int | None:
    """The largest rank of the adapters and of a new one, if that is the new one's."""
    config = source[0] if isinstance(source, tuple) else read_adapter(source, tuner.backend.state.table)[0]
    there = [largest_rank(resident.config) for resident in tuner.state.recipe.values()]
    new = largest_rank(config)
    return new if new > max(there) else None


def largest_rank(config: AdapterConfig) -> int:
    """0 for a method without ranks."""
    if not config.ranked:
        return 0
    return max([getattr(config, config.ranked), *(getattr(config, "rank_pattern", None) or {}).values()])


def widen(tuner: Tuner, rank: int) -> None:
    """Wider tensors for every adapter, zeros in what is new."""
    tuner.backend.keep(widened(tuner.backend.adapters, tuner.state, rank))
    tuner.refresh()


def prepare_model_for_compiled_hotswap(model: nn.Module, *, target_rank: int | None = None, config: Any = None,
                                       check_compiled: str = "error") -> None:  # fmt: skip
    """Widens every adapter to target_rank with zeros, before compiling, so that others of any rank up to it can be swapped in.

    Scales are tensors always. config, or name -> config: gets target_rank as its rank. check_compiled: "error", "warn" or
    "ignore" a model that is compiled already. Raises ValueError, and HotswapError for a larger rank that there is. The adapters'
    parameters are new ones: make the optimiser after this.
    """
    if check_compiled not in ("error", "warn", "ignore"):
        raise ValueError(
            f"check_compiled should be one of 'error', 'warn', or 'ignore', got {check_compiled!r} instead."
        )
    tuner = tuner_of(model)
    if is_compiled(model) and check_compiled != "ignore":
        text = (
            "call prepare_model_for_compiled_hotswap before compiling the model: what is compiled has narrower tensors"
        )
        if check_compiled == "error":
            raise ValueError(text)
        warn(text)
    if target_rank is None:
        return
    widen(tuner, target_rank)
    for given in config.values() if isinstance(config, dict) else () if config is None else (config,):
        given.r = target_rank
        given.rank_pattern = dict.fromkeys(given.rank_pattern or {}, target_rank)


def check_hotswap_configs_compatible(config0: Any, config1: Any) -> None:
    """Raises HotswapError, a ValueError, where an adapter of one config can never take the place of one of the other.

    Whether tensors fit is checked by the swap, which changes nothing if they do not.
    """
    types = [as_config(config).peft_type for config in (config0, config1)]
    if types[0] != types[1]:
        raise HotswapError(
            f"a {types[0]} adapter cannot take the numbers of a {types[1]} one: load it under a name of its own"
        )
