"""The base model's embedding and head in an adapter's file: a model that got new tokens is not the one on the Hub any more.

PEFT writes them where it must assume that they are no longer the base's (`save_embedding_layers="auto"`): if the config names
them as targets, trained token rows aside, or if the vocabulary has another size than the base's config says. Their keys
tell how PEFT wraps the module. Loading writes them into the base model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from ...config import AdapterConfig
from ...engine.replaced import shelved
from ...errors import AdapterFileError
from ...notices import warn
from ...planning.modules import module_table
from ...planning.plan import PREFIX
from ...planning.selection import choose_saved
from ...store.tensors import get_tensor
from ...target import ModuleTable, sizes
from ..compat.constants import EMBEDDING_LAYER_NAMES, INCLUDE_LINEAR_LAYERS_SHORTHAND
from ..model.tuner import Tuner

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# what a module's own parameters are called below its path, by the method on it; "": none is
BASE = {"SAVED": "original_module.", "TOKENS": "token_adapter.base_layer.", "": ""}
ADAPTED = "base_layer."  # any other
COPY = "modules_to_save."  # PEFT writes a saved module's trained copy twice


def embedding_tensors(
    tuner: Tuner,
    adapter: str,
    save_embedding_layers: bool | str = "auto",
    state_dict: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """File key -> tensor: what goes into the adapter's file besides its own tensors. save_embedding_layers: as in PEFT.

    state_dict: of the whole model, which comes before the model's own tensors.
    """
    model, config = tuner.model, tuner.peft_config[adapter]
    targeted = names_embedding(model, config)
    save = save_embedding_layers
    if save == "auto":
        save = changed(model, config, targeted)
    if not save:
        return {}
    state = tuner.backend.state
    paths = embedding_paths(state.table)
    if not paths:
        warn("Could not identify embedding layer(s) because the model is not a 🤗 transformers model.")
    methods = {p.target.path: p.method for p in state.recipe[adapter].placements}
    found, given, shelf = {}, state_dict or {}, shelved(tuner.backend.adapters)
    for path in paths:
        method = methods.get(path, "")
        if targeted and method in BASE:
            continue
        for name in model.get_submodule(path).state_dict():
            here = f"{path}.{name}"
            now = given.get(f"{PREFIX}{here}", given.get(here, get_tensor(model, here)))
            tensor = shelf.get(here, now)  # what a merge has replaced is the base's
            found[f"{PREFIX}{path}.{BASE.get(method, ADAPTED)}{name}"] = cast(torch.Tensor, tensor).detach()
    return found


def embedding_paths(table: ModuleTable) -> list[str]:
    """Of the input embedding and of the head; [] for models that are not transformers'."""
    return list(dict.fromkeys(p for p in (table.input_embedding, table.output_head) if p is not None))


def names_embedding(model: nn.Module, config: AdapterConfig) -> bool:
    """Whether target_modules has one of the two names of embeddings that PEFT looks for."""
    names = config.target_modules or []
    if not isinstance(names, str):
        return any(name in names for name in EMBEDDING_LAYER_NAMES)
    if names == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        return False
    paths = (path for path, _ in model.named_modules() if path.rpartition(".")[2] in EMBEDDING_LAYER_NAMES)
    return any(re.fullmatch(names, path) for path in paths)


def changed(model: nn.Module, config: AdapterConfig, targeted: bool) -> bool:
    """What "auto" means."""
    tokens = config.peft_type == "TRAINABLE_TOKENS" or config.trainable_token_indices is not None
    if targeted and not tokens:
        warn("Setting `save_embedding_layers` to `True` as embedding layers found in `target_modules`.")
        return True
    size, base = getattr(getattr(model, "config", None), "vocab_size", None), config.base_model_name_or_path
    if not size or not base:
        return False
    try:
        before = type(cast("PreTrainedModel", model).config).from_pretrained(base).vocab_size
    except (OSError, ValueError):  # no such folder or repository, or offline and not in the cache
        warn(f"Could not find a config file in {base} - will assume that the vocabulary was not modified.")
        return False
    if size != before:
        warn("Setting `save_embedding_layers` to `True` as the embedding layer has been resized during finetuning.")
    return size != before


@contextmanager
def loaded_embeddings(
    model: nn.Module, config: AdapterConfig, tensors: dict, where: str, own: Mapping[str, torch.Tensor] | None = None
) -> Iterator[dict[str, torch.Tensor]]:
    """Inside the block, and after it, `model` has what a file says of the base's embedding and head; yields the other tensors.

    own: file key -> what else of the model it names, as `own_parameters` finds it. An error in the block puts the numbers
    from before back: what is left of the file may not fit. Raises AdapterFileError, and has changed nothing, for a tensor of
    another shape than the model's.
    """
    rest, new = base_tensors(model, config, tensors, where)
    new += [(parameter, rest.pop(key)) for key, parameter in (own or {}).items() if key in rest]
    before = [(parameter, parameter.detach().clone()) for parameter, _ in new]
    try:
        write(new)
        yield rest
    except BaseException:
        write(before)
        raise


@torch.no_grad()
def write(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for parameter, tensor in pairs:
        parameter.copy_(tensor)


def own_parameters(tuner: Tuner, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """File key -> the parameter of the base that it names: of an adapter that trained biases, for one that has none of its own.

    Not those of another shape, nor those that a merge has replaced.
    """
    found: dict[str, torch.Tensor] = {}
    shelf = shelved(tuner.backend.adapters)
    for name, parameter in tuner.model.named_parameters(remove_duplicate=False):
        path, _, leaf = name.rpartition(".")
        for key in (f"{PREFIX}{name}", f"{PREFIX}{path}.{ADAPTED}{leaf}"):
            if key in tensors and name not in shelf and tensors[key].shape == parameter.shape:
                found[key] = parameter
    return found


def base_tensors(model: nn.Module, config: AdapterConfig, tensors: dict, where: str) -> tuple[dict, list]:
    """A file's tensors that are not the base's, and (parameter of the model, what the file has for it)."""
    table, rest, new = module_table(model), dict(tensors), []
    saved = {s.path for s in choose_saved(table, config)[0]}
    for path in embedding_paths(table):
        infixes = [ADAPTED, *BASE.values()]
        if path in saved:
            infixes.remove("")  # the key of the trained copy
        for name, parameter in model.get_submodule(path).state_dict(keep_vars=True).items():
            rest.pop(f"{PREFIX}{path}.{COPY}{name}", None)
            for key in (key for infix in infixes if (key := f"{PREFIX}{path}.{infix}{name}") in rest):
                tensor = rest.pop(key)
                if tensor.shape != parameter.shape:
                    raise AdapterFileError(
                        f"{where}: {key}: expected shape {sizes(parameter.shape)}, got {sizes(tensor.shape)}: "
                        f"model.resize_token_embeddings({tensor.shape[0]}) before loading"
                    )
                new.append((parameter, tensor))
    return rest, new
