"""What a `.pt2` needs registered before torch can read it: transformers' output classes and custom operators.

Importing the module that defines them registers them; none but transformers' own modules are imported for a file.
"""

from __future__ import annotations

import re
from importlib import import_module
from zipfile import ZipFile

from ..errors import AdapterFileError

PROGRAM = "models/model.json"
CLASS = re.compile(rb'"type\\*": \\*"(transformers(?:\.\w+)+)\.\w+')
OPERATOR = b"torch.ops.transformers."
OPERATORS_IN = "transformers.integrations.moe"


def register_for(archive: ZipFile) -> None:
    """Imports what the program in an opened `.pt2` names."""
    for name in archive.namelist():
        if name.endswith(PROGRAM):
            register_named(archive.read(name), archive.filename)


def register_named(text: bytes, where: object) -> None:
    """Imports what a serialised program names. Raises AdapterFileError if this transformers lacks it."""
    modules = {m.decode() for m in CLASS.findall(text)} | ({OPERATORS_IN} if OPERATOR in text else set())
    for module in sorted(modules):
        try:
            import_module(module)
        except ImportError as error:
            raise AdapterFileError(f"{where}: needs {module}, which the installed transformers lacks") from error
