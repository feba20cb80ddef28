"""Reads adapter folders, local or on the Hugging Face hub. Files come from strangers: nothing in them is executed, no
link leads out of the folder, and every fault is an AdapterFileError that names the file.
"""

from __future__ import annotations

import json
import math
import pickle
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from ..config import CONFIG_FILE as CONFIG
from ..config import AdapterConfig
from ..errors import AdapterFileError, RecipeError
from ..notices import warn
from ..recipe import config_from_dict
from ..target import ModuleTable
from .experts import stacked
from .foreign import from_foreign
from .paths import as_path

TENSORS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
DIFFUSERS = "pytorch_lora_weights.safetensors"
MAX_CONFIG_BYTES = 16 * 2**20
# methods that PEFT has renamed: old peft_type -> new one, and the part of the keys that changed with it
RENAMED = {"BONE": ("MISS", ".bone_", ".miss_")}
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # that most adapters have
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def read_adapter(
    source, table: ModuleTable, config: AdapterConfig | None = None
) -> tuple[AdapterConfig, dict[str, torch.Tensor]]:
    """Config, and PEFT's keys -> tensors, of an adapter for the model of `table`. Raises AdapterFileError.

    source: an adapter folder or hub id, or a LoRA file of another program's, or the folder of one (`foreign.py`).
    config: in place of the one that is there.
    """
    if (file := foreign_file(source)) is not None:
        found, tensors = from_foreign(read_safetensors(file), metadata_of(file), table, where=str(source))
        config = config or found
    else:
        folder = local_folder(source)
        config, tensors = stacked(config or read_config(folder), read_tensors(folder), table, where=str(source))
    if text := config.missing_base():
        warn(f"{source}: {text}")
    return config, tensors


def foreign_file(source) -> Path | None:
    """The one safetensors file that `source` is or has, unless it is an adapter folder."""
    path = as_path(source, "an adapter folder, a .safetensors file or a hub id")
    if path.is_file():
        if path.suffix != ".safetensors":
            raise AdapterFileError(f"{source}: expected an adapter folder or a .safetensors file; pickles are not opened: "
                                   "convert it to safetensors")  # fmt: skip
        return path
    folder = local_folder(source)
    if any((folder / name).exists() for name in (CONFIG, TENSORS, PICKLE)):
        return None
    names = [DIFFUSERS] if (folder / DIFFUSERS).exists() else sorted(p.name for p in folder.glob("*.safetensors"))
    if len(names) > 1:
        raise AdapterFileError(
            f"{source}: has no {CONFIG} and several .safetensors files, give one: {', '.join(names)}"
        )
    return file_in(folder, names[0]) if names else None


def read_config(folder, subfolder: str | None = None, **hub) -> AdapterConfig:
    """The config in `folder` (a local folder, or a hub id "org/name"). hub: as for `located`. Raises AdapterFileError."""
    path = file_in(local_folder(folder, subfolder, **hub), CONFIG)
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
        return config_from_dict(data, str(path))
    except RecipeError as error:
        raise AdapterFileError(f"{path}: {error}") from error


AdapterConfig.reader = staticmethod(read_config)


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
        found = of_one_dtype(path)
        return load_file(path, device="cpu") if found is None else found
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise AdapterFileError(f"{path}: not a sound safetensors file: {error}") from error


def of_one_dtype(path: Path) -> dict[str, torch.Tensor] | None:
    """`load_file` in a third of its time, for files whose tensors have one common dtype; None for any other.

    The file is mapped once, and cut into views. safetensors has checked that its tensors follow one another without holes
    to the file's end, so their sizes say where each begins.
    """
    before = path.stat()
    with safe_open(path, framework="pt") as file:
        headers = {key: file.get_slice(key) for key in file.offset_keys()}
    dtypes = {header.get_dtype() for header in headers.values()}
    dtype = DTYPES.get(dtypes.pop()) if len(dtypes) == 1 else None
    if dtype is None:
        return None
    shapes = [header.get_shape() for header in headers.values()]
    sizes = [math.prod(shape) for shape in shapes]
    start = before.st_size - sum(sizes) * dtype.itemsize
    if start % dtype.itemsize:
        return None
    numbers = torch.from_file(str(path), shared=False, size=before.st_size, dtype=torch.uint8)[start:].view(dtype)
    after = path.stat()
    if (before.st_ino, before.st_size, before.st_mtime_ns) != (after.st_ino, after.st_size, after.st_mtime_ns):
        return None  # somebody wrote it meanwhile: header and numbers may not belong together
    return {key: part.view(shape) for key, part, shape in zip(headers, numbers.split(sizes), shapes, strict=True)}


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


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


def local_folder(source, subfolder: str | None = None, **hub) -> Path:
    """`located`, for folders alone."""
    path = located(source, subfolder, **hub)
    if not path.is_dir():
        raise AdapterFileError(
            f"{path}: {'is a file' if path.is_file() else 'is not there'}, expected an adapter folder"
        )
    return path


def located(source, subfolder: str | None = None, **hub) -> Path:
    """A local file or folder as it is; adapter files of a hub id are downloaded. hub: arguments of `snapshot_download`.

    Raises AdapterFileError.
    """
    path = as_path(source, "a folder or a hub id")
    if path.exists():
        return path / subfolder if subfolder else path
    if not HUB_ID.fullmatch(str(source)):
        raise AdapterFileError(f"{source}: no such folder, and no hub id of the form org/name")
    if hub.get("use_auth_token") is not None:
        hub["token"] = hub.pop("use_auth_token")
    folder = download(str(source), subfolder, hub)
    return folder / subfolder if subfolder else folder


def download(repo_id: str, subfolder: str | None, hub: dict) -> Path:
    from huggingface_hub import snapshot_download  # needed for hub ids only
    from huggingface_hub.errors import HfHubHTTPError

    try:
        wanted = [f"{subfolder}/{name}" if subfolder else name for name in (CONFIG, TENSORS, PICKLE, DIFFUSERS)]
        return Path(snapshot_download(repo_id, allow_patterns=wanted, **hub))
    except (HfHubHTTPError, OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise AdapterFileError(f"{repo_id}: no local folder, and not to be had from the hub: {reason}") from error
