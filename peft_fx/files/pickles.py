"""Reads PEFT's older format, pickles of tensors. They come from strangers: nothing in them is run, and what they ask for is
bounded by the size of the file before anything is taken.
"""

from __future__ import annotations

import pickle
import pickletools
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch

from ..errors import AdapterFileError

# what dicts of tensors are made of; a `bytearray` or `Tensor` of any size is no more than its name and a number
NAMES = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor(_v[23])?|parameter)|torch\._tensor _rebuild_from_type_v2|"
    r"torch(\.storage)? \w*Storage|torch\.nn\.parameter Parameter|torch (b?float|u?int|complex|bool)\w*"
)
LEGACY = 5  # pickles at the start of a file that is no archive: two numbers and a dict that say what it is, the object, its keys
TOLD = 3
ASK = "ask for a safetensors file"


def read_pickle(path: Path) -> dict[str, torch.Tensor]:
    """Key -> tensor. Raises AdapterFileError."""
    try:
        refuse_large(path)
        data = torch.load(path, map_location="cpu", weights_only=True)
    except AdapterFileError:
        raise
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
        reason = str(error).partition("\n")[0]
        raise AdapterFileError(f"{path}: not a file of tensors only: {reason}; {ASK}") from error
    if not isinstance(data, dict) or not all(isinstance(v, torch.Tensor) for v in data.values()):
        raise AdapterFileError(f"{path}: expected a dict of tensors")
    return data


def refuse_large(path: Path) -> None:
    """Raises AdapterFileError for a file that would take more memory than it has bytes, or anything but tensors."""
    size = path.stat().st_size
    if zipfile.is_zipfile(path):
        refuse_packed(path)
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith("data.pkl"):
                    with archive.open(name) as file:
                        refuse_operations(path, size, pickletools.genops(file))
        return
    with path.open("rb") as file:
        for number in range(LEGACY):
            refuse_operations(path, size if number >= TOLD else None, pickletools.genops(file))


def refuse_packed(path: Path) -> None:
    """Raises AdapterFileError for an archive whose contents are larger than itself; torch's are not compressed."""
    with zipfile.ZipFile(path) as archive:
        contents, size = sum(entry.file_size for entry in archive.infolist()), path.stat().st_size
    if contents > size:
        raise AdapterFileError(f"{path}: {size} bytes that unpack to {contents}: torch packs nothing; {ASK}")


def refuse_operations(path: Path, size: int | None, operations: Iterator) -> None:
    """Raises AdapterFileError for a name that is not of tensors, or a number above the file's size. size None: any number."""
    for operation, value, _ in operations:
        if operation.name == "STACK_GLOBAL" or (operation.name in ("GLOBAL", "INST") and not NAMES.fullmatch(value)):
            raise AdapterFileError(f"{path}: not a file of tensors only: names {value or 'objects'!r}; {ASK}")
        if size is not None and type(value) is int and value > size:
            raise AdapterFileError(f"{path}: asks for {value} numbers in a file of {size} bytes; {ASK}")
