"""transformers' `model.load_adapter` over our reader: its own puts files' tensors where PEFT's layers have them."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast, get_origin

import torch
from huggingface_hub import snapshot_download
from transformers.utils.loading_report import LoadStateDictInfo

from ...config import AdapterConfig
from ...errors import RecipeError
from ...files.keys import mapped
from ...files.read import located, read_adapter
from ...planning.modules import module_table
from ...recipe import as_config
from ..model.functional import set_peft_model_state_dict
from ..model.hotswap import prepare_model_for_compiled_hotswap
from ..model.injection import inject_adapter_in_model, injected, remove_adapter
from ..model.tuner import DEFAULT, Tuner

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HUB = frozenset(inspect.signature(snapshot_download).parameters) | {"subfolder"}


def load_adapter(theirs: Callable, model: PreTrainedModel, *args: Any, **kwargs: Any) -> LoadStateDictInfo:
    """In place of `theirs`, with its arguments."""
    call = inspect.signature(theirs).bind(model, *args, **kwargs)
    if model._hf_peft_config_loaded and injected(model) is None:
        return theirs(*call.args, **call.kwargs)  # PEFT has adapted it
    call.apply_defaults()
    given = dict(call.arguments) | call.arguments["kwargs"]
    config, tensors = contents(model, **given)
    return load(model, config, tensors, given["adapter_name"] or DEFAULT, given["hotswap"], given["is_trainable"])


def contents(
    model: PreTrainedModel,
    *,
    peft_model_id: str | None,
    peft_config: Any,
    adapter_state_dict: dict[str, torch.Tensor] | None,
    adapter_kwargs: dict[str, Any] | None,
    local_files_only: bool,
    load_config: Any,
    key_mapping: dict[str, str] | None = None,
    **rest: Any,
) -> tuple[AdapterConfig, dict[str, torch.Tensor]]:
    """Config and tensors of what is to be loaded: files, or what was given. Raises AdapterFileError, RecipeError."""
    config = None if peft_config is None else as_config(peft_config)
    if adapter_state_dict is not None and config is not None:
        return config, mapped(adapter_state_dict, key_mapping)
    downloads = dict(getattr(load_config, "download_kwargs", None) or rest.get("download_kwargs") or {})
    hub = {**downloads, **(adapter_kwargs or {}), **({"local_files_only": True} if local_files_only else {})}
    where = peft_model_id or getattr(load_config, "pretrained_model_name_or_path", None)
    if where is None:
        raise RecipeError("nothing to load: give peft_model_id, or peft_config and adapter_state_dict")
    folder = located(where, **{k: v for k, v in hub.items() if k in HUB and v is not None})
    config, tensors = read_adapter(folder, module_table(model), config, key_mapping)
    return config, tensors if adapter_state_dict is None else mapped(adapter_state_dict, key_mapping)


def load(
    model: PreTrainedModel, config: AdapterConfig, tensors: dict, name: str, hotswap: bool | str, trainable: bool
) -> LoadStateDictInfo:
    """A new adapter, which acts alone, or other numbers for a resident one."""
    tuner = injected(model)
    there = tuner is not None and name in tuner.peft_config
    if hotswap == "auto":
        hotswap = there and getattr(model, "_hotswap_enabled", False)
    if hotswap != there:
        raise RecipeError(
            f"there is an adapter {name!r} already: give another name, or hotswap=True" if there
            else f"hotswap: there is no adapter {name!r} to swap; load one first, without hotswap=True"
        )  # fmt: skip
    if tuner is not None and hotswap:
        tuner.hotswap((config, tensors), name)
        return nothing_missing()
    config.inference_mode = not trainable
    inject_adapter_in_model(config, model, name)
    try:
        missing, unexpected = set_peft_model_state_dict(model, tensors, name)
    except BaseException:
        remove_adapter(model, name)
        raise
    if options := getattr(model, "_prepare_peft_hotswap_kwargs", None):
        prepare_model_for_compiled_hotswap(model, **options)
        model._prepare_peft_hotswap_kwargs = None
    model._hf_peft_config_loaded = True
    if not trainable:
        model.eval()
    cast(Tuner, injected(model)).set_requires_grad(name, trainable)
    info = nothing_missing()
    info.missing_keys.update(missing)
    info.unexpected_keys.update(unexpected)
    return info


def nothing_missing() -> LoadStateDictInfo:
    kinds: dict[str, Any] = {f.name: f.type for f in dataclasses.fields(LoadStateDictInfo)}
    return LoadStateDictInfo(**{name: (get_origin(kind) or kind)() for name, kind in kinds.items()})
