"""What is done to a module of others: now, if it is imported, else as soon as it has been."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from .changes import Changes

Then = Callable[[ModuleType, Changes], None]


def when_imported(then: dict[str, Then], changes: Changes) -> None:
    """then: name of a module -> what is called with it, and with where its changes are written down."""
    changes.front(sys.meta_path, WhenImported(then, changes))
    for name in then.keys() & sys.modules.keys():
        then[name](sys.modules[name], changes)


class WhenImported(MetaPathFinder):
    """An entry of `sys.meta_path`. Others find and run a module; afterwards its turn comes."""

    def __init__(self, then: dict[str, Then], changes: Changes):
        self.then, self.changes = then, changes

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in self.then:
            return None
        others = (f for f in sys.meta_path if f is not self)
        spec = next((s for f in others if (s := f.find_spec(name, path, target))), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                if self in sys.meta_path:  # not undone meanwhile
                    self.then[name](module, self.changes)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]  # meant
        return spec
