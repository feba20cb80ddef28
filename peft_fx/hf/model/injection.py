"""Adapters in a model that stays what it is, without a `PeftModel` around it."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import torch
from torch import nn

from ...config import AdapterConfig
from ...notices import warn
from ...planning.modules import module_table
from ...planning.plan import PREFIX, make_plan
from ...recipe import as_config
from ...verbs.tensors import INJECTED
from .tuner import DEFAULT, Tuner


def inject_adapter_in_model(peft_config: Any, model: nn.Module, adapter_name: str = DEFAULT, low_cpu_mem_usage: bool = False,
                            state_dict: dict[str, torch.Tensor] | None = None) -> nn.Module:  # fmt: skip
    """The same model, whose calls run adapted from now on; its submodule `peft_adapters` holds the adapters' tensors.

    state_dict: keys of an adapter's file, which name the targets in place of the config. A model that has adapters already gets
    one more, which acts alone. `peft_fx.functional` has what a PeftModel has as methods.
    """
    config = as_config(peft_config)
    if state_dict is not None:
        config = with_targets_of(state_dict, config, model)
    if INJECTED in model.__dict__:
        tuner = model.__dict__[INJECTED]
        tuner.add(adapter_name, config)
        tuner.peft_config.adopt(adapter_name, peft_config)
        tuner.set_adapter(adapter_name, config.inference_mode)
    else:
        tuner = model.__dict__[INJECTED] = Tuner(model, config, adapter_name)
        tuner.peft_config.adopt(adapter_name, peft_config)
    model.peft_config = tuner.peft_config  # where transformers and diffusers look for the names of adapters
    return model


def injected(model: nn.Module) -> Tuner | None:
    return model.__dict__.get(INJECTED)


def remove_adapter(model: nn.Module, name: str) -> None:
    """Takes one away; with the last one the model is as it was before it had any."""
    tuner = cast(Tuner, injected(model))
    if set(tuner.peft_config) == {name}:
        remove_all(model)
    else:
        tuner.delete_adapter(name)
        model.peft_config = tuner.peft_config  # type: ignore[assignment]  # no tensor


def remove_all(model: nn.Module) -> nn.Module:
    """The model as it was before adapters were injected; what is merged stays merged."""
    cast(Tuner, injected(model)).unload()
    del model.__dict__[INJECTED], model.peft_config
    model.__dict__.pop("_hf_peft_config_loaded", None)  # a mark of transformers' and diffusers'
    return model


def with_targets_of(state_dict: dict, config: AdapterConfig, model: nn.Module) -> AdapterConfig:
    """The config, for the modules that the keys name."""
    if config.target_parameters:
        raise ValueError(
            "state_dict with target_parameters: the keys do not say which parameter they are for; leave one out"
        )
    table = module_table(model)
    found = set()
    for key in state_dict:
        path = key.removeprefix(PREFIX)
        while path and path not in table:
            path = path.rpartition(".")[0]
        if not path:
            raise ValueError(
                f"the state dict names {key!r}, and the model has no such module: pass one made for this model"
            )
        found.add(path)
    by_config = make_plan(table, "config", config, strict=False).targets if config.target_modules else ()
    if by_config and {t.path for t in by_config} != found:
        warn(
            f"While injecting the PEFT adapters, an inconsistency was discovered: the config names {len(by_config)} modules, "
            f"the state dict {len(found)}; those of the state dict are taken",
            RuntimeWarning,
        )
    return dataclasses.replace(config, target_modules=sorted(found), exclude_modules=None, layers_to_transform=None,
                               layers_pattern=None)  # fmt: skip
