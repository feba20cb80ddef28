"""PEFT's free functions over a `PeftModel`, or a model that adapters were injected into."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys
from transformers import PreTrainedModel

from ...engine.filing import adapter_files
from ...engine.transitions import planned
from ...files.keys import of_model
from ...files.match import needless
from ...methods.base import HALF
from ...notices import warn
from ...planning.plan import PREFIX
from ...store.state import state_of
from ...store.unwrap import unwrapped
from ...verbs.tensors import parameters_of
from ..compat.constants import UPCAST_DTYPES, PeftWarning
from ..compat.sharding import gathered
from ..files.contents import adapter_contents
from ..files.embeddings import loaded_embeddings, own_parameters
from .injection import injected
from .numbers import warned
from .status import TunerLayerStatus, TunerModelStatus, layer_status, model_status
from .tuner import DEFAULT, tuner_of

LOW = HALF | {getattr(torch, name) for name in UPCAST_DTYPES if hasattr(torch, name)}


# Numbers


def get_peft_model_state_dict(model: nn.Module, state_dict: Mapping[str, torch.Tensor] | None = None,
                              adapter_name: str = DEFAULT, unwrap_compiled: bool = False,
                              save_embedding_layers: bool | str = "auto") -> dict[str, torch.Tensor]:  # fmt: skip
    """File key -> tensor of one adapter; the tensors are the model's own, or those of a state dict of the whole model.

    The keys of a model that adapters were injected into have no base_model.model. in front, as in PEFT. unwrap_compiled is not
    read: wrappers are seen through, and of a model that FSDP 1 has sharded the tensors are gathered.
    save_embedding_layers: whether the base's embedding and head are among them.
    """
    tuner = tuner_of(model)
    tuner.known((adapter_name,))
    with gathered(model) as sharded:
        tensors = adapter_contents(tuner, adapter_name, save_embedding_layers, state_dict)[1]
        if sharded:
            tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    bare = injected(unwrapped(model)) is not None
    return {k.removeprefix(PREFIX): t for k, t in tensors.items()} if bare else tensors


def set_peft_model_state_dict(model: nn.Module, peft_model_state_dict: dict, adapter_name: str = DEFAULT,
                              ignore_mismatched_sizes: bool = False,
                              low_cpu_mem_usage: bool = False) -> _IncompatibleKeys:  # fmt: skip
    """Writes file key -> tensor into a resident adapter, in place; what is missing keeps its numbers.

    Returns missing_keys and unexpected_keys, as the file's keys, of this adapter alone. Raises AdapterFileError for a tensor
    of another shape, which ignore_mismatched_sizes leaves out with a warning.
    """
    tuner, bare = tuner_of(model), injected(unwrapped(model)) is not None
    tuner.known((adapter_name,))
    gm = tuner.backend.adapters
    config = state_of(gm).recipe[adapter_name].config
    plan = planned(state_of(gm), adapter_name, config)
    wanted = {key: (p, name) for p, name, keys in plan.filed for key in keys}
    keyed = {PREFIX + k.removeprefix(PREFIX) if bare and k not in wanted else k: k for k in peft_model_state_dict}
    keyed = of_model(keyed, state_of(gm).table)
    found = {key: peft_model_state_dict[k] for key, k in keyed.items()}
    given = {key: t for key, t in found.items() if key in wanted}
    misfit: dict[str, tuple] = {}
    if ignore_mismatched_sizes:
        shapes = {k: (tuple(t.shape), tuple(p.tensors[name].shape))
                  for k, t in given.items() for p, name in [wanted[k]] if p.tensors[name].pieces is None}  # fmt: skip
        misfit = {k: pair for k, pair in shapes.items() if pair[0] != pair[1]}
        if misfit:
            lines = [f"{k}: found {found}, expected {expected}" for k, (found, expected) in misfit.items()]
            warn("\n  ".join(["Left out, since their shapes differ:", *lines]), PeftWarning)
            given = {k: t for k, t in given.items() if k not in misfit}
    missing = [k for k, (p, name) in wanted.items() if k not in given and name not in p.shared]
    others = {k: t for k, t in found.items() if k not in wanted}
    with (
        gathered(model),
        loaded_embeddings(tuner.model, config, others, "the state dict", own_parameters(tuner, others)) as rest,
    ):
        kept = adapter_files(gm, adapter_name)[1]
        tuner.hotswap((config, {k: kept[k] for k in missing} | given), adapter_name)
    unexpected = [keyed[k] for k in rest.keys() - needless(rest, plan)]
    result = _IncompatibleKeys([k.removeprefix(PREFIX) if bare else k for k in missing], sorted(unexpected))
    warned(
        _IncompatibleKeys([k for k in missing if k not in misfit], result.unexpected_keys),
        adapter_name,
        "the state dict",
    )
    return result


def cast_adapter_dtype(model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """Parameters of an adapter in half precision or less become float32, as they are from the start: new Parameters."""
    tuner = tuner_of(model)
    tuner.known((adapter_name,))
    owned = [t.tensor for t in parameters_of(model) if t.placement.adapter == adapter_name]
    if autocast_adapter_dtype and any(t.dtype in LOW for t in owned):
        config, tensors = adapter_files(tuner.backend.adapters, adapter_name)
        with tuner.changing():
            active = tuner.state.active
            tuner.backend.delete(adapter_name)
            tuner.add(adapter_name, config, (tensors, "the adapter"), any(t.requires_grad for t in owned))
            tuner.become(tuner.state.update(active=active))


# Which adapters act and train


def set_adapter(
    model: nn.Module, adapter_name: str | Iterable[str], inference_mode: bool = False, layer_cls: object = None
) -> None:
    """The adapters that act from now on, in order, and are trainable unless inference_mode. layer_cls is not read."""
    tuner_of(model).set_adapter(adapter_name, inference_mode)


def set_requires_grad(model: nn.Module, adapter_names: str | Iterable[str], requires_grad: bool = True) -> None:
    tuner_of(model).set_requires_grad(adapter_names, requires_grad)


def delete_adapter(model: nn.Module, adapter_name: str, prefix: str = "", layer_cls: object = None) -> list[str]:
    """Returns the adapters that act then. prefix and layer_cls are not read."""
    tuner = tuner_of(model)
    tuner.delete_adapter(adapter_name)
    return tuner.active_adapters


# What there is


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """A record per adapted module. Raises TypeError for a model without adapters."""
    found, bare = layer_status(tuner_of(model)), injected(unwrapped(model)) is not None
    return [replace(r, name=r.name.removeprefix("model.")) for r in found] if bare else found


def get_model_status(model: nn.Module) -> TunerModelStatus:
    tuner, model = tuner_of(model), unwrapped(model)
    if injected(model) is None:
        return model_status(tuner, type(tuner.model).__name__, tuner._get_name())
    return model_status(tuner, type(model).__name__ if isinstance(model, PreTrainedModel) else "other", "None")
