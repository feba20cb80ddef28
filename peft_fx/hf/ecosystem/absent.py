"""PEFT, not installed: a module `peft` whose names are ours, found by `import`, `find_spec` and `importlib.metadata`."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NoReturn

from ...config import AdapterConfig
from ...errors import ImportOrderError, UnsupportedError
from ...missing import NAMES as MISSING
from ...missing import not_yet
from ..compat.submodules import look_up, make_submodules
from .changes import Changes

OURS = __name__.partition(".")[0]
NAME = "peft"
# what asks for PEFT while it is imported, and leaves out what needs it
DECIDE = ("diffusers", "transformers.trainer", "transformers.trainer_utils", "trl")
# functions that remember whether it was there
REMEMBER = ("is_peft_available", "is_peft_greater_or_equal")


def stand_in(version: str, changes: Changes) -> ModuleType:
    """Puts the module where `import` finds it. Raises ImportOrderError after the import of a package that went without PEFT."""
    if late := [name for name in DECIDE if name in sys.modules]:
        raise ImportOrderError(
            f"PEFT is not installed, and {', '.join(late)}, imported before, left out what needs it: call as_peft() before "
            "importing them"
        )
    module = ModuleType(NAME, f"{OURS}, under PEFT's name.")
    module.__spec__ = ModuleSpec(NAME, None, is_package=True)
    module.__path__ = []
    vars(module).update(__version__=version, __getattr__=attribute)
    changes.item(sys.modules, NAME, module)
    for name in make_submodules(OURS, NAME):
        changes.stack.callback(sys.modules.pop, name, None)
    forget()
    changes.stack.callback(forget)
    return module


def attribute(name: str) -> Any:
    """A name of ours, or a class that stands for what is missing."""
    if name in MISSING and name.endswith("Config"):
        return refusing(name)
    return look_up(OURS, NAME, ("",), name)


def refusing(name: str) -> type:
    """A config of a method that is missing: others import it to ask whether theirs is one; to make one is refused."""

    def new(cls: type, *args: Any, **fields: Any) -> NoReturn:
        raise UnsupportedError(not_yet(name))

    made = type(name, (AdapterConfig,), {"__new__": new, "__module__": NAME})
    setattr(sys.modules[NAME], name, made)
    return made


def forget() -> None:
    asking = sys.modules.get("transformers.utils.import_utils")
    for name in REMEMBER if asking else ():
        getattr(asking, name).cache_clear()
