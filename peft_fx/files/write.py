"""Writes adapter folders as PEFT does: two files, read by PEFT without a warning."""

from __future__ import annotations

import json
import os
from dataclasses import fields, replace
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ..atomic import StrPath, Writers, write_files
from ..config import AdapterConfig
from ..errors import AdapterFileError
from ..missing import PEFT_VERSION
from ..planning.plan import Plan
from .read import CONFIG, TENSORS


def write_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """A safetensors file with our own version in its header: PEFT warns of any key in the config that it does not know."""
    metadata = {"format": "pt", "peft_fx": version("peft-fx")}
    try:
        save_file(plain(tensors), path, metadata=metadata)
    except SafetensorError as error:  # what it makes of the system's errors
        raise OSError(str(error)) from error
    # safetensors writes them in either order; equal adapters are to be equal files
    one, other = (json.dumps(dict(m), separators=(",", ":")).encode() for m in (metadata, reversed(metadata.items())))
    with path.open("r+b") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
        file.seek(8)
        file.write(header.replace(other, one, 1))


def write_adapter(folder: StrPath, config: AdapterConfig, tensors: dict[str, torch.Tensor],
                  others: Writers | None = None) -> Path:  # fmt: skip
    """Writes config and tensors (file key -> tensor) into `folder`, made if need be; other files in it stay.

    others: name -> function that writes one more file. All come into place as one: a failure, or a kill at any moment, leaves
    the old ones or the new ones. Returns the folder. Raises AdapterFileError.
    """
    folder, text = Path(folder), config_json(config)
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise AdapterFileError(f"{folder}: is a file, expected a folder to write the adapter to")
    own = {
        TENSORS: lambda path: write_tensors(tensors, path),
        CONFIG: lambda path: path.write_text(text, encoding="utf-8"),
    }
    return write_files(folder, own | dict(others or {}))


def config_json(config: AdapterConfig) -> str:
    """PEFT's JSON: sorted keys, indent 2, ready for inference."""
    saved = {**config.to_dict(), "inference_mode": True, "peft_version": PEFT_VERSION}
    return json.dumps(saved, indent=2, sort_keys=True)


def file_config(config: AdapterConfig, plan: Plan) -> AdapterConfig:
    """The config as PEFT would have corrected it: `fan_in_fan_out` says how the adapted linear weights are stored."""
    if "fan_in_fan_out" not in {f.name for f in fields(config)}:
        return config
    # methods of this config, whichever variant it chose; not what all configs share
    adapted = [p.target for p in plan.placements if isinstance(config, getattr(p.rule, "Config", ()))]
    stored = {"fan_in_fan_out": any(t.kind == "linear" and t.transposed for t in adapted)}
    return replace(config, **stored)  # type: ignore[arg-type]  # some configs' field


def plain(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous tensors on the CPU, no two of which share memory."""
    seen, result = set(), {}
    for key, tensor in tensors.items():
        tensor = tensor.detach().to("cpu").contiguous()
        storage = tensor.untyped_storage().data_ptr()
        whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        result[key] = tensor if whole and storage not in seen else tensor.clone()
        seen.add(storage)
    return result
