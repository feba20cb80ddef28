"""Reads adapter folders, local or on the Hugging Face hub. Files come from strangers: nothing in them is executed, no
link leads out of the folder, and every fault is an AdapterFileError that names the file.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from ..atomic import StrPath, current
from ..config import AdapterConfig
from ..config_files import CONFIG_FILE as CONFIG
from ..errors import AdapterFileError, NotAConfigError, RecipeError
from ..notices import warn
from ..recipe import config_from_dict
from ..target import ModuleTable
from .experts import stacked
from .foreign import from_foreign
from .keys import RENAMED, mapped, of_method, of_model
from .paths import as_path
from .pickles import read_pickle

TENSORS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
DIFFUSERS = "pytorch_lora_weights.safetensors"
MAX_CONFIG_BYTES = 16 * 2**20
TRIES = 100
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # that most adapters have
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def read_adapter(
    source: StrPath, table: ModuleTable, config: AdapterConfig | None = None, key_mapping: dict[str, str] | None = None
) -> tuple[AdapterConfig, dict[str, torch.Tensor]]:
    """Config, and PEFT's keys -> tensors, of an adapter for the model of `table`. Raises AdapterFileError.

    source: an adapter folder or hub id, or a LoRA file of another program's, or the folder of one (`foreign.py`).
    config: in place of the one that is there. key_mapping: regex -> replacement, for modules that are called otherwise there.
    """
    if (file := foreign_file(source)) is not None:
        found, tensors = from_foreign(read_safetensors(file), metadata_of(file), table, where=str(source))
        config, tensors = config or found, mapped(tensors, key_mapping)
    else:
        folder = local_folder(source)
        found, tensors = of_one_save(folder, lambda: (config or config_in(folder), tensors_in(folder)))
        config, tensors = stacked(found, of_model(mapped(tensors, key_mapping), table), table, where=str(source))
    if text := config.missing_base():
        warn(f"{source}: {text}")
    return config, tensors


def of_one_save(folder: Path, read: Callable[[], Any]) -> Any:
    """What `read` gives of a folder's files, all of them of one save: once more where somebody saved meanwhile."""
    for _ in range(TRIES):
        with ExitStack() as held:  # open files, whose numbers no others get
            try:
                files = [path and held.enter_context(path.open("rb")) for path in adapter_paths(folder)]
                before = [file and os.fstat(file.fileno()) for file in files]
            except FileNotFoundError:  # moved to its place since it was looked for
                continue
            except OSError as error:
                raise AdapterFileError(f"{error.filename}: cannot be read: {error.strerror}") from error
            try:
                found = read()
            except AdapterFileError:
                if same_files(before, adapter_paths(folder)):
                    raise
                continue
            if same_files(before, adapter_paths(folder)):
                return found
    raise AdapterFileError(
        f"{folder}: somebody writes it all the time, {TRIES} readings were each of two different saves"
    )


def adapter_paths(folder: Path) -> list[Path | None]:
    return [file_in(folder, name) for name in (CONFIG, TENSORS, PICKLE)]


def same_files(stats: list, paths: list[Path | None]) -> bool:
    """Whether the files at these paths are still those of `stats`, as they were."""
    try:
        now = [path and path.stat() for path in paths]
    except FileNotFoundError:
        return False
    before, after = ([s and (s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns) for s in found] for found in (stats, now))
    return before == after


def foreign_file(source: StrPath) -> Path | None:
    """The one safetensors file that `source` is or has, unless it is an adapter folder."""
    path = as_path(source, "an adapter folder, a .safetensors file or a hub id")
    if path.is_file():
        if path.suffix != ".safetensors":
            raise AdapterFileError(f"{source}: expected an adapter folder or a .safetensors file; pickles are not opened: "
                                   "convert it to safetensors")  # fmt: skip
        return path
    folder = local_folder(source)
    if any(adapter_paths(folder)):
        return None
    names = [DIFFUSERS] if (folder / DIFFUSERS).exists() else sorted(p.name for p in folder.glob("*.safetensors"))
    if len(names) > 1:
        raise AdapterFileError(
            f"{source}: has no {CONFIG} and several .safetensors files, give one: {', '.join(names)}"
        )
    return file_in(folder, names[0]) if names else None


def read_config(folder: StrPath, subfolder: str | None = None, **hub: Any) -> AdapterConfig:
    """The config in `folder` (a local folder, or a hub id "org/name"). hub: as for `located`. Raises AdapterFileError."""
    local = local_folder(folder, subfolder, **hub)
    return of_one_save(local, lambda: config_in(local))


def config_in(folder: Path) -> AdapterConfig:
    data = config_data(folder)
    if data is None:
        raise AdapterFileError(f"{folder}: has no {CONFIG}")
    if (old := str(data.get("peft_type"))) in RENAMED:
        data = {**data, "peft_type": RENAMED[old][0]}
    if data.get("peft_type") is None:
        keys = ", ".join(data) or "none"
        raise NotAConfigError(
            f"{folder / CONFIG}: is no adapter's config, which names its peft_type; it has the keys {keys}"
        )
    try:
        return config_from_dict(data, str(folder / CONFIG))
    except RecipeError as error:
        raise AdapterFileError(f"{folder / CONFIG}: {error}") from error


def config_data(folder: Path) -> dict | None:
    """What a folder's config says; None if there is none. Raises AdapterFileError."""
    path = file_in(folder, CONFIG)
    if path is None:
        return None
    try:
        size = path.stat().st_size
        data = json.loads(path.read_text(encoding="utf-8")) if size <= MAX_CONFIG_BYTES else None
    except OSError as error:
        raise AdapterFileError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"{path}: not valid JSON: {error}") from error
    if size > MAX_CONFIG_BYTES:
        raise AdapterFileError(f"{path}: {size} bytes are no config")
    if not isinstance(data, dict):
        raise AdapterFileError(f"{path}: expected a JSON object, got {type(data).__name__}")
    return data


def read_tensors(folder: StrPath) -> dict[str, torch.Tensor]:
    """File key -> tensor, on the CPU; safetensors are mapped, not copied. Raises AdapterFileError."""
    local = local_folder(folder)
    return of_one_save(local, lambda: tensors_in(local))


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    for name, read in ((TENSORS, read_safetensors), (PICKLE, read_pickle)):
        if (path := file_in(folder, name)) is not None:
            tensors = read(path)
            if any(key.endswith(old) for key in tensors for _, old, _ in RENAMED.values()):
                tensors = of_method(tensors, str((config_data(folder) or {}).get("peft_type")))
            return tensors
    raise AdapterFileError(f"{folder}: has neither {TENSORS} nor {PICKLE}")


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


def file_in(folder: Path, name: str) -> Path | None:
    """The file if it exists. Raises AdapterFileError if it is a link that leaves the folder.

    The hub's cache keeps a snapshot's files as links into the `blobs` folder beside `snapshots`: those may be followed.
    """
    path = current(folder, name)
    if not path.is_file():
        return None
    real = path.resolve()
    allowed = [folder.resolve()]
    allowed += [p.parent / "blobs" for p in folder.resolve().parents if p.name == "snapshots"]
    if not any(real.is_relative_to(a) for a in allowed):
        raise AdapterFileError(f"{path}: is a link to {real}, outside its folder")
    return path


def local_folder(source: StrPath, subfolder: str | None = None, **hub: Any) -> Path:
    """`located`, for folders alone."""
    path = located(source, subfolder, **hub)
    if not path.is_dir():
        raise AdapterFileError(
            f"{path}: {'is a file' if path.is_file() else 'is not there'}, expected an adapter folder"
        )
    return path


def located(source: StrPath, subfolder: str | None = None, **hub: Any) -> Path:
    """A local file or folder as it is; adapter files of a hub id are downloaded. hub: arguments of `snapshot_download`.

    Raises AdapterFileError.
    """
    path = as_path(source, "a folder or a hub id")
    if os.path.exists(path):
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
