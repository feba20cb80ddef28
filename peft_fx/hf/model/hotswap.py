"""Swapping adapters in a PeftModel that is compiled, or will be."""

from __future__ import annotations

from torch import nn

from ...errors import HotswapError
from ...notices import warn
from ...recipe import as_config
from ...verbs.widen import prepare_hotswap
from .tuner import tuner_of


def prepare_model_for_compiled_hotswap(model: nn.Module, *, target_rank: int | None = None, config=None,
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
    tuner = tuner_of(getattr(model, "_orig_mod", model))
    own_call = model._compiled_call_impl if model is not tuner.model else None
    if (hasattr(model, "_orig_mod") or own_call) and check_compiled != "ignore":
        text = (
            "call prepare_model_for_compiled_hotswap before compiling the model: what is compiled has narrower tensors"
        )
        if check_compiled == "error":
            raise ValueError(text)
        warn(text)
    if target_rank is None:
        return
    tuner.backend.set_adapter(())  # there is no graph to put any into
    tuner.backend.keep(prepare_hotswap(tuner.backend.adapters, max_rank=target_rank))
    tuner.refresh()
    for given in config.values() if isinstance(config, dict) else () if config is None else (config,):
        given.r = target_rank
        given.rank_pattern = dict.fromkeys(given.rank_pattern or {}, target_rank)


def check_hotswap_configs_compatible(config0, config1) -> None:
    """Raises HotswapError, a ValueError, where an adapter of one config can never take the place of one of the other.

    Whether tensors fit is checked by the swap, which changes nothing if they do not.
    """
    types = [as_config(config).peft_type for config in (config0, config1)]
    if types[0] != types[1]:
        raise HotswapError(
            f"a {types[0]} adapter cannot take the numbers of a {types[1]} one: load it under a name of its own"
        )
