"""Reads adapter folders, local or on the Hugging Face hub. Files come from strangers: nothing in them is executed, no
link leads out of the folder, and every fault is an AdapterFileError that names the file.
"""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..config import AdapterConfig
from ..errors import AdapterFileError, RecipeError
from ..recipe import config_from_dict

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
MAX_CONFIG_BYTES = 16 * 2**20
# methods that PEFT has renamed: old peft_type -> new one, and the part of the keys that changed with it
RENAMED = {"BONE": ("MISS", ".bone_", ".miss_")}
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def read_config(folder) -> AdapterConfig:
    """The config in `folder` (a local folder, or a hub id "org/name"). Raises AdapterFileError."""
    path = file_in(local_folder(folder), CONFIG)
    if path is None:
        raise AdapterFileError(f"{folder}: has no {CONFIG}")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise AdapterFileError(f"{path}: {path.stat().st_size} bytes are no config")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise AdapterFileError(f"{path}: expected a JSON object, got {type(data).__name__}")
    if (old := str(data.get("peft_type"))) in RENAMED:
        data = {**data, "peft_type": RENAMED[old][0]}
    try:
        return config_from_dict(data)
    except RecipeError as error:
        raise AdapterFileError(f"{path}: {error}") from error


def read_tensors(folder) -> dict[str, torch.Tensor]:
    """File key -> tensor, on the CPU; safetensors are mapped, not copied. Raises AdapterFileError."""
    local = local_folder(folder)
    for name, read in ((TENSORS, read_safetensors), (PICKLE, read_pickle)):
        if (path := file_in(local, name)) is not None:
            return {new_key(key): tensor for key, tensor in read(path).items()}
    raise AdapterFileError(f"{folder}: has neither {TENSORS} nor {PICKLE}")


def new_key(key: str) -> str:
    """The key as PEFT writes it today."""
    for _, old, new in RENAMED.values():
        key = key.replace(old, new)
    return key


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """safetensors checks the header against the file's size before it takes any memory."""
    try:
        return load_file(path, device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterFileError(f"{path}: not a sound safetensors file: {error}") from error


def read_pickle(path: Path) -> dict[str, torch.Tensor]:
    """PEFT's older format, restricted to tensors: code in it is refused, never run."""
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise AdapterFileError(f"{path}: not a file of tensors only: {reason}; ask for a safetensors file") from error
    if not isinstance(data, dict) or not all(isinstance(v, torch.Tensor) for v in data.values()):
        raise AdapterFileError(f"{path}: expected a dict of tensors")
    return data


def file_in(folder: Path, name: str) -> Path | None:
    """The file if it exists. Raises AdapterFileError if it is a link that leaves the folder.

    The hub's cache keeps a snapshot's files as links into the `blobs` folder beside `snapshots`: those may be followed.
    """
    path = folder / name
    if not path.is_file():
        return None
    real = path.resolve()
    allowed = [folder.resolve()]
    allowed += [p.parent / "blobs" for p in folder.resolve().parents if p.name == "snapshots"]
    if not any(real.is_relative_to(a) for a in allowed):
        raise AdapterFileError(f"{path}: is a link to {real}, outside its folder")
    return path


def local_folder(source) -> Path:
    """A local folder as it is; a hub id is downloaded, adapter files only. Raises AdapterFileError."""
    path = Path(source)
    if path.is_dir():
        return path
    if path.exists():
        raise AdapterFileError(f"{source}: is a file, expected an adapter folder")
    if not HUB_ID.fullmatch(str(source)):
        raise AdapterFileError(f"{source}: no such folder, and no hub id of the form org/name")
    return download(str(source))


def download(repo_id: str) -> Path:
    from huggingface_hub import snapshot_download  # needed for hub ids only
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(repo_id, allow_patterns=[CONFIG, TENSORS, PICKLE]))
    except (HfHubHTTPError, OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise AdapterFileError(f"{repo_id}: no local folder, and not to be had from the hub: {reason}") from error
