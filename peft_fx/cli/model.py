"""What MODEL names: a `.pt2`'s graph, or a config, which becomes a model on the meta device, without weights.

Only transformers' own model classes are built: no code that a folder or the hub brings along is run.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ..errors import CaptureError, PeftFxError
from ..files.read import CONFIG as ADAPTER_CONFIG
from ..files.read import HUB_ID
from ..planning.modules import module_table
from ..target import ModuleTable
from .terminal import working

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

CONFIG = "config.json"


class ModelNotFound(PeftFxError, ValueError):
    """MODEL is nothing that can be opened."""


@dataclass(frozen=True)
class Archive:
    """A `.pt2`: a graph with its weights."""

    path: Path
    weights = True

    def graph(self) -> fx.GraphModule:
        from ..verbs.export import load

        with working(f"loading {self.path.name}"):
            return load(self.path)


@dataclass(frozen=True)
class Built:
    """A model on the meta device, to be captured if someone asks for its graph."""

    model: PreTrainedModel
    weights = False

    @cached_property
    def table(self) -> ModuleTable:
        return module_table(self.model)

    def graph(self) -> fx.GraphModule:
        from ..verbs.capture.model import capture

        layers = getattr(self.model.config.get_text_config(), "num_hidden_layers", None)
        with working(f"capturing {type(self.model).__name__}" + (f", {layers} layers" if layers else "")):
            return capture(self.model)


def open_model(source: str) -> Archive | Built:
    """What a `.pt2`, a config file, a model folder or a hub id holds. Raises PeftFxError."""
    path = Path(source).expanduser()
    if path.suffix == ".pt2":
        return Archive(path)
    with working(f"building {source}"):
        return Built(build(config_of(config_source(path, source), source), source))


def config_source(path: Path, source: str) -> str:
    """The file or hub id that the config is read from."""
    if path.is_file():
        if path.suffix != ".json":
            raise ModelNotFound(f"{source}: expected a .pt2, a config.json, a model folder or a hub id")
        return str(path)
    if path.is_dir():
        if (path / CONFIG).is_file():
            return str(path / CONFIG)
        if (path / ADAPTER_CONFIG).is_file():
            raise ModelNotFound(f"{source}: is an adapter; name its model, and give this folder as --adapter")
        raise ModelNotFound(f"{source}: has no {CONFIG}")
    if not HUB_ID.fullmatch(source) or source.startswith("."):
        raise ModelNotFound(f"{source}: no such file or folder, and no hub id of the form org/name")
    return source


def config_of(where: str, source: str) -> PretrainedConfig:
    """transformers' config object. Raises ModelNotFound."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(where, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, RecursionError, StrictDataclassError) as error:
        raise ModelNotFound(f"{source}: no config that this transformers can read: {first_line(error)}") from error


def build(config: PretrainedConfig, source: str) -> PreTrainedModel:
    """The model on the meta device, in eval mode.

    The attention named in a config is not used: it may be code on the hub, and changes no target.
    """
    try:
        with torch.device("meta"):
            model = model_class(config)._from_config(config, attn_implementation=None, experts_implementation=None)
    except (ValueError, TypeError, AttributeError, RuntimeError, ImportError, KeyError) as error:
        raise CaptureError(f"{source}: the model cannot be built from its config: {first_line(error)}") from error
    return model.eval()


def model_class(config: PretrainedConfig) -> Any:
    """The class that the config names among transformers' own, else the first auto class that knows the config."""
    import transformers

    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    for auto in (transformers.AutoModelForSeq2SeqLM, transformers.AutoModelForCausalLM, transformers.AutoModel):
        if type(config) in auto._model_mapping:
            found = auto._model_mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    raise ValueError(f"transformers has no model class for {config.architectures or type(config).__name__}")


def first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
