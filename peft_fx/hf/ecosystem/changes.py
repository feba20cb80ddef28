"""Changes to modules and classes of others, written down as they are made, so that all can be taken back."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack

ABSENT = object()


class Changes:
    """What was changed, in order; `undo` takes it back, the last change first."""

    def __init__(self):
        self.stack = ExitStack()

    def undo(self) -> None:
        self.stack.close()

    def attribute(self, owner, name: str, new) -> None:
        """An attribute of a module or a class. What was inherited is inherited again afterwards."""
        old = vars(owner).get(name, ABSENT)
        setattr(owner, name, new)
        self.stack.callback(*((delattr, owner, name) if old is ABSENT else (setattr, owner, name, old)))

    def constructor(self, cls: type, new: Callable) -> None:
        """What a call of a class makes, where the class had no `__new__`."""
        cls.__new__ = new
        # not deleted: a class that had one once refuses arguments afterwards
        self.stack.callback(setattr, cls, "__new__", plain)

    def item(self, table: dict, key, new) -> None:
        old = table.get(key, ABSENT)
        table[key] = new
        self.stack.callback(*((table.pop, key, None) if old is ABSENT else (table.__setitem__, key, old)))

    def bases(self, cls: type, new: tuple[type, ...]) -> None:
        self.stack.callback(setattr, cls, "__bases__", cls.__bases__)
        cls.__bases__ = new

    def front(self, entries: list, new) -> None:
        """A new first entry of a list, such as `sys.meta_path`."""
        entries.insert(0, new)
        self.stack.callback(lambda: new in entries and entries.remove(new))

    def functions(self, replaced: dict[Callable, Callable]) -> None:
        """Each of these functions for its replacement, under every name that any imported module has for it."""
        rebind(replaced)
        self.stack.callback(rebind, {new: old for old, new in replaced.items()})


def plain(cls, *args, **kwargs):
    return object.__new__(cls)


def rebind(replaced: dict[Callable, Callable]) -> None:
    by_id = {id(old): new for old, new in replaced.items()}
    for module in list(sys.modules.values()):
        names = getattr(module, "__dict__", None)
        for name, value in list(names.items()) if isinstance(names, dict) else ():
            if id(value) in by_id:
                names[name] = by_id[id(value)]
