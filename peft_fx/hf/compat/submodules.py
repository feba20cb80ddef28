"""PEFT's submodules: `from peft_fx.utils import ...` finds what `from peft.utils import ...` does.

They are names only, for modules of ours that are imported when something is asked of them.
"""

from __future__ import annotations

import sys
from functools import partial
from importlib.machinery import ModuleSpec
from pkgutil import resolve_name
from types import ModuleType
from typing import Any

from ...methods import INTERNAL, METHODS

FILES = [entry[0] for name, entry in METHODS.items() if name not in INTERNAL and isinstance(entry, tuple)]
# PEFT's submodule -> where its names are found, below this package; "": in the package itself; after a colon: in what a module
# has under that name
SUBMODULES = {
    "auto": ("hf.files.auto",),
    "functional": ("hf.model.functional", "hf.model.hotswap", "hf.model.injection"),
    "helpers": ("hf.compat.helpers", "hf.compat.signatures", "hf.compat.kappa"),
    "mapping": ("hf.compat.constants", "hf.compat.mappings", "hf.compat.helpers", "hf.model.injection"),
    "mapping_func": ("hf.model.model",),
    "mixed_model": ("hf.model.model",),
    "optimizers": ("training.loraplus", "training.lorafa", "training.riemannian"),
    "optimizers.lorafa": ("training.lorafa",),
    "optimizers.loraplus": ("training.loraplus",),
    "optimizers.riemannian": ("training.riemannian",),
    "peft_model": ("hf.model.model", "hf.model.functional"),
    "tuners": ("",),
    **{f"tuners.{file}": ("", f"hf.layers.named:{file}") for file in FILES},
    **{f"tuners.{file}.layer": (f"hf.layers.named:{file}", f"methods.{file}") for file in FILES},
    "tuners.tuners_utils": ("hf.layers.base", "hf.model.tuners"),
    "utils": (
        "hf.compat.constants",
        "peft_types",
        "hf.compat.kbit",
        "hf.compat.helpers",
        "hf.model.functional",
        "hf.model.hotswap",
        "hf.model.weights",
        "hf.layers.wrappers",
    ),
    "utils.constants": ("hf.compat.constants",),
    "utils.hotswap": ("hf.model.hotswap",),
    "utils.other": (
        "hf.compat.constants",
        "hf.compat.kbit",
        "hf.compat.helpers",
        "hf.model.weights",
        "hf.compat.sharding",
        "hf.layers.wrappers",
    ),
    "utils.peft_types": ("peft_types",),
    "utils.save_and_load": ("hf.model.functional", "hf.model.weights"),
}


def look_up(package: str, name: str, places: tuple[str, ...], attribute: str) -> Any:
    """The attribute of the first place that has it."""
    if not attribute.startswith("__"):  # what Python and its tools ask of every module, which must not import anything
        for place in places:
            module = resolve_name(f"{package}.{place}".rstrip("."))
            if hasattr(module, attribute):
                return getattr(module, attribute)
    raise AttributeError(f"module {name!r} has no attribute {attribute!r}")


def make_submodules(package: str, under: str | None = None) -> list[str]:
    """Puts them where `import` looks, and under their names into `package`; returns the names of those that were not there.

    under: another package, whose submodules they become. A reload of the package keeps them.
    """
    made = []
    for submodule, places in SUBMODULES.items():
        parent, _, leaf = f"{under or package}.{submodule}".rpartition(".")
        name = f"{parent}.{leaf}"
        if name in sys.modules:
            continue
        module = ModuleType(name, f"Names of PEFT's, from {', '.join(f'{package}.{p}'.rstrip('.') for p in places)}.")
        module.__spec__ = ModuleSpec(name, None, is_package=True)
        module.__path__ = []  # a package, without files of its own
        vars(module)["__getattr__"] = partial(look_up, package, name, places)
        sys.modules[name] = module
        setattr(sys.modules[parent], leaf, module)
        made.append(name)
    return made
