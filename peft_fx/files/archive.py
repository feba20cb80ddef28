"""torch's `.pt2` archives as files: written so that a full disk is an error, and read as data alone.

torch.export.load runs code that an archive names: it unpickles some kinds of weights, constants and example inputs, evaluates the
text of symbolic sizes, and imports the modules of enums. What would be run is found by torch's own reader of archives first.
"""

from __future__ import annotations

import ast
import io
import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.export.pt2_archive import constants as names

from ..atomic import write_files
from ..errors import AdapterFileError
from .pickles import refuse_packed

DATA_ONLY = (
    "such a file runs code of its author's when it is loaded. If you trust it: peft_fx.capture(torch.export.load(path))"
)
# what symbolic sizes are made of, besides torch's functions: sympy's classes, and the functions that its printer writes
CALLED = {
    "Symbol", "Integer", "Float", "Rational", "Add", "Mul", "Pow", "Mod", "Max", "Min", "Abs",
    "Equality", "Unequality", "GreaterThan", "StrictGreaterThan", "LessThan", "StrictLessThan", "Eq", "Ne", "Ge", "Gt", "Le",
    "Lt", "And", "Or", "Not", "Piecewise", "ExprCondPair", "ceiling", "floor", "sqrt", "log", "exp",
}  # fmt: skip
TERMS = (
    ast.Expression, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.Call, ast.keyword, ast.Name, ast.Constant, ast.Tuple,
    ast.operator, ast.unaryop, ast.boolop, ast.cmpop, ast.expr_context,
)  # fmt: skip
TEXT = re.compile(r"[\w.+-]*")  # names of symbols, and numbers
OBJECTS = (names.CUSTOM_OBJ_FILENAME_PREFIX, names.OPAQUE_OBJ_FILENAME_PREFIX)
PACKAGES = ("torch", "transformers", "builtins", "collections")  # that the structure of arguments may name


class Unfailing(io.BufferedWriter):
    """A file that takes all that comes, and keeps the error of what it could not write: torch's writer ends the process."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        if self.error is None:
            try:
                return super().write(data)
            except OSError as error:
                self.error = error
        return memoryview(data).nbytes


def archive_to(path: Path, write: Callable[[Unfailing], object]) -> None:
    """Has torch write an archive. Raises OSError."""
    with Unfailing(io.FileIO(path, "w")) as file:
        write(file)
    if file.error is not None:
        raise file.error


def replace_archive(path: Path, write: Callable[[Path], object]) -> None:
    """A `.pt2`, whole or not at all: `write` gets the path of a file to write. Raises AdapterFileError."""
    if path.is_dir() or not path.parent.is_dir():
        raise AdapterFileError(f"{path}: expected a file path in an existing folder")
    write_files(path.parent, {path.name: write})


def opened(path: Path) -> zipfile.ZipFile:
    """A `.pt2` as an archive, in which nothing is to be run but compiled code."""
    if not path.is_file():
        raise AdapterFileError(f"{path}: no such file")
    if not zipfile.is_zipfile(path):
        raise AdapterFileError(f"{path}: is no .pt2 file, or cut off")
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise AdapterFileError(f"{path}: is no .pt2 file, or cut off: {error}") from error
    try:
        if not any(name.endswith("/archive_format") for name in archive.namelist()):
            raise AdapterFileError(f"{path}: is a zip file, but holds no torch.export program")
        refuse_packed(path)
        if len({name.partition("/")[0] for name in archive.namelist()}) > 1:
            raise AdapterFileError(f"{path}: has files beside its program, {DATA_ONLY}")  # torch falls back on such
        refuse_code(path)
    except BaseException:
        archive.close()
        raise
    return archive


def refuse_code(path: Path) -> None:
    """Raises AdapterFileError, naming the record, if torch.export.load would run what an archive names."""
    try:
        reader = torch._C.PyTorchFileReader(str(path))
        records = reader.get_all_records()
        if len({name.lower() for name in records}) < len(records):  # it finds names in either case
            raise AdapterFileError(f"{path}: is damaged: has two records of one name")
        for name in records:
            if found := code_in(name, reader):
                raise AdapterFileError(f"{path}: {name} holds {found}: {DATA_ONLY}")
    except (RuntimeError, ValueError, RecursionError, KeyError, TypeError) as error:
        if isinstance(error, AdapterFileError):
            raise
        raise AdapterFileError(f"{path}: is damaged: {str(error).strip().partition(chr(10))[0]}") from error


def code_in(record: str, reader: torch._C.PyTorchFileReader) -> str | None:
    """What of a record would be run, or None."""
    name = record.lower()
    if name.startswith(names.MODELS_DIR):
        return code_in_program(json.loads(reader.get_record(record)))
    if name.startswith(names.SAMPLE_INPUTS_DIR):
        return None if is_plain(reader.get_record(record)) else "pickled objects"
    if name.startswith((names.WEIGHTS_DIR, names.CONSTANTS_DIR)):
        if name.endswith(".pt"):
            return "pickled objects"
        if name.endswith(".json"):
            entries = json.loads(reader.get_record(record))["config"].values()
            if any(entry.get("use_pickle") or entry["path_name"].startswith(OBJECTS) for entry in entries):
                return "pickled objects"
    return None


def is_plain(record: bytes) -> bool:
    """Whether a pickle is of tensors and containers. torch takes any other one too, once it has seen that."""
    try:
        if record:
            torch.load(io.BytesIO(record), weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError):
        return False
    return True


def code_in_program(data: object) -> str | None:
    for value in entries(data):
        if not is_arithmetic(value.get("expr_str", "0")):
            return f"{str(value['expr_str'])[:80]!r} as a size"
        for name in (value.get("fqn") if "__enum__" in value else None, value.get("default_factory_module")):
            if name is not None and re.split("[.:]", str(name))[0] not in PACKAGES:
                return f"the name {str(name)[:80]!r}, which would be imported,"
    return None


def entries(data: object) -> Iterator[dict]:
    """All dicts in JSON, and in the JSON that is text in it, as the structure of arguments is."""
    if isinstance(data, str) and data[:1] in ("{", "["):
        try:
            data = json.loads(data)
        except ValueError:
            return
    if isinstance(data, dict):
        yield data
        data = list(data.values())
    if isinstance(data, list):
        for value in data:
            yield from entries(value)


def is_arithmetic(text: object) -> bool:
    """Whether a symbolic size calls nothing but functions of numbers; sympy evaluates it as Python."""
    from torch.utils._sympy.functions import __all__ as own  # imports sympy

    try:
        nodes = list(ast.walk(ast.parse(str(text).strip(), mode="eval")))
    except (SyntaxError, ValueError):
        return False
    return all(
        isinstance(node, TERMS)
        and not (isinstance(node, ast.Call) and getattr(node.func, "id", None) not in {*CALLED, *own})
        and not (isinstance(node, ast.Constant) and not TEXT.fullmatch(str(node.value)))
        for node in nodes
    )
