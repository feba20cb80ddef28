"""`save_pretrained`: each adapter's files, the model card, and what a Trainer resumes from."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.utils import SAFE_WEIGHTS_NAME

from ...atomic import StrPath, write_files
from ...config import AdapterConfig
from ...errors import NotAFolderError
from ...files.write import write_adapter, write_tensors
from ...notices import warn
from ...store.modules import reading
from ..model.tuner import DEFAULT, IN_MODEL
from .card import CARD, card_of
from .contents import adapter_contents

if TYPE_CHECKING:
    from ..model.model import PeftModel


def save_pretrained(model: PeftModel, save_directory: StrPath, safe_serialization: bool = True,
                    selected_adapters: list[str] | None = None, save_embedding_layers: bool | str = "auto",
                    is_main_process: bool = True, path_initial_model_for_weight_conversion: str | None = None,
                    **kwargs: Any) -> None:  # fmt: skip
    """Writes each adapter as PEFT's files, and a model card. "default" goes to the folder, others to folders in it.

    state_dict: of the whole model, where its own tensors are shards. A Trainer, which gives one, gets a file more: what
    it loads when it resumes, all adapters by their names here. The files of one folder come into place as one. Raises
    AdapterFileError, before anything is written where a card that is there cannot be read.
    """
    folder = Path(save_directory)
    if os.path.isfile(folder):
        raise NotAFolderError(f"Provided path ({folder}) should be a directory, not a file")
    names = list(model.peft_config) if selected_adapters is None else selected_adapters
    if unknown := [n for n in names if n not in model.peft_config]:
        raise ValueError(f"there is no adapter {unknown[0]!r} to save; there are: {', '.join(model.peft_config)}")
    if not safe_serialization:
        warn(
            "safe_serialization=False would write a pickle: adapters are written as safetensors, which everything reads"
        )
    if path_initial_model_for_weight_conversion is not None:
        raise ValueError(
            "path_initial_model_for_weight_conversion is for initialisations that change the base weight (PiSSA, CorDA, "
            "OLoRA, LoRA-GA), which this version does not have: leave it out"
        )
    if not is_main_process:
        return
    with reading(model.base_model.backend.adapters):
        write_whole(model, folder, names, save_embedding_layers, kwargs)


def write_whole(
    model: PeftModel, folder: Path, names: list[str], save_embedding_layers: bool | str, kwargs: dict
) -> None:
    """The files of the adapters `names`."""
    given = kwargs.get("state_dict") or None
    contents = {name: adapter_contents(model.base_model, name, save_embedding_layers, given) for name in names}
    beside = {CARD: card_writer(folder, [model.peft_config[n] for n in names], model.get_base_model())}
    if "state_dict" in kwargs:
        ours = {k: t for k, t in (given or model.state_dict()).items() if k.startswith(IN_MODEL)}
        beside[SAFE_WEIGHTS_NAME] = lambda path: write_tensors(ours, path)
    if DEFAULT in contents:
        write_adapter(folder, *contents.pop(DEFAULT), beside)
    else:
        write_files(folder, beside)
    for name, files in contents.items():
        write_adapter(folder / name, *files)


def create_or_update_model_card(model: PeftModel, output_dir: StrPath) -> None:
    """README.md, which `save_pretrained` writes too. Raises AdapterFileError, and NotAFolderError for a file."""
    folder = Path(output_dir)
    if os.path.isfile(folder):
        raise NotAFolderError(f"File exists: {folder}, expected a folder to write {CARD} into")
    write_files(folder, {CARD: card_writer(folder, list(model.peft_config.values()), model.get_base_model())})


def card_writer(folder: Path, configs: list[AdapterConfig], base: nn.Module) -> Callable[[Path], object]:
    text = card_of(folder, configs, base)
    return lambda path: path.write_text(text, encoding="utf-8", newline="")
