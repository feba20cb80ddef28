"""The operators of ours that saved graphs call, known to torch as soon as there is torch.

`import peft_fx` does not import torch, but `torch.export.load` after it has to find them, whichever is imported first.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

# the last one registers kernels/packed.py, and tells it what formats are
MODULES = (
    "kernels.butterfly",
    "kernels.circulant",
    "kernels.householder",
    "kernels.noise",
    "kernels.requantized",
    "storage.schemes",
)


def register() -> None:
    for module in MODULES:
        import_module(f"{__package__}.{module}")


class BeforeTorch(MetaPathFinder):
    """Stands in the way of the first import of torch, lets it pass, and registers the operators after it."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname != "torch":
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                register()

            spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


def register_with_torch() -> None:
    """Registers now if torch is imported, else when it will be."""
    if "torch" in sys.modules:
        register()
    elif not any(isinstance(finder, BeforeTorch) for finder in sys.meta_path):
        sys.meta_path.insert(0, BeforeTorch())
