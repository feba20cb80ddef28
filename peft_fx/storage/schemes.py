"""The schemes: name -> (module, class), imported when they are first asked for."""

from __future__ import annotations

from functools import cache
from importlib import import_module

from ..errors import StorageError
from ..kernels import packed
from .base import Storage
from .formats import Format, parse

SCHEMES: dict[str, tuple[str, str]] = {
    "bnb4": ("bnb4", "BitsAndBytes4"),
    "bnb8": ("bnb8", "BitsAndBytes8"),
    "gptq": ("gptq", "GPTQ"),
    "awq": ("awq", "AWQ"),
    "hqq": ("hqq", "HQQ"),
    "eetq": ("eetq", "EETQ"),
    "aqlm": ("aqlm", "AQLM"),
    "inc": ("inc", "INC"),
    "inc8": ("inc8", "INC8"),
    "torchao": ("torchao", "Torchao"),
    "torchao_nf4": ("torchao_nf4", "TorchaoNF4"),
    "tinygemm": ("tinygemm", "TinyGemm"),
    "quanto": ("quanto", "Quanto"),
    "gguf": ("gguf", "GGUF"),
    "mxfp4": ("mxfp4", "MXFP4"),
    "compressed_tensors": ("compressed_tensors", "CompressedTensors"),
    "fp8": ("fp8", "Float8"),  # behind those that keep float8 in torch's own layers
}


@cache
def scheme(name: str) -> Storage:
    """The storage called `name`. Raises StorageError with the known names."""
    if name not in SCHEMES:
        raise StorageError(
            f"a weight is kept as {name!r}, which this version does not know: it has {', '.join(SCHEMES)}"
        )
    module, cls = SCHEMES[name]
    return getattr(import_module(f".{module}", __package__), cls)()


def read(text: str) -> tuple[Storage, Format]:
    """The storage and the format that a text stands for. Raises StorageError."""
    f = parse(text)
    return scheme(f.scheme), f


packed.readers.append(read)
