"""Changes to modules and classes of others, written down as they are made, so that all can be taken back."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, TypeVar

Entry = TypeVar("Entry")
Made = TypeVar("Made")
ABSENT = object()


class Changes:
    """What was changed, in order; `undo` takes it back, the last change first."""

    def __init__(self) -> None:
        self.stack = ExitStack()

    def undo(self) -> None:
        self.stack.close()

    def attribute(self, owner: Any, name: str, new: Any) -> None:
        """An attribute of a module or a class. What was inherited is inherited again afterwards."""
        old = vars(owner).get(name, ABSENT)
        setattr(owner, name, new)
        self.stack.callback(*((delattr, owner, name) if old is ABSENT else (setattr, owner, name, old)))

    def constructor(self, cls: type, new: Callable) -> None:
        """What a call of a class makes, where the class had no `__new__`."""
        cls.__new__ = new  # type: ignore[method-assign]  # meant
        # not deleted: a class that had one once refuses arguments afterwards
        self.stack.callback(setattr, cls, "__new__", plain)

    def item(self, table: dict, key: Any, new: Any) -> None:
        old = table.get(key, ABSENT)
        table[key] = new
        self.stack.callback(*((table.pop, key, None) if old is ABSENT else (table.__setitem__, key, old)))

    def bases(self, cls: type, new: tuple[type, ...]) -> None:
        self.stack.callback(setattr, cls, "__bases__", cls.__bases__)
        cls.__bases__ = new

    def front(self, entries: list[Entry], new: Entry) -> None:
        """A new first entry of a list, such as `sys.meta_path`."""

        def take_out() -> None:
            if new in entries:
                entries.remove(new)

        entries.insert(0, new)
        self.stack.callback(take_out)

    def functions(self, replaced: dict[Callable, Callable]) -> None:
        """Each of these functions for its replacement, under every name that any imported module has for it."""
        rebind(replaced)
        self.stack.callback(rebind, {new: old for old, new in replaced.items()})


def plain(cls: type[Made], *args: Any, **kwargs: Any) -> Made:
    return object.__new__(cls)


def rebind(replaced: dict[Callable, Callable]) -> None:
    by_id = {id(old): new for old, new in replaced.items()}
    for module in list(sys.modules.values()):
        names: Any = getattr(module, "__dict__", None)
        for name, value in list(names.items()) if isinstance(names, dict) else ():
            if id(value) in by_id:
                names[name] = by_id[id(value)]
