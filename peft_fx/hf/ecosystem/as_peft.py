"""`as_peft`: scripts and libraries that import `peft` run on peft_fx, their imports unchanged."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from types import ModuleType

from .absent import stand_in
from .callers import CALLERS
from .changes import Changes
from .imports import when_imported
from .version import Answers, answered, installed


class AsPeft:
    """What `as_peft` did. `undo`, or the end of a `with` block, takes it back."""

    def __init__(self, changes: Changes, version: str):
        self.changes, self.version = changes, version

    def undo(self) -> None:
        global standing
        if standing is self:
            standing = None
            self.changes.undo()

    def __enter__(self) -> AsPeft:
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()

    def __repr__(self) -> str:
        return f"<peft {self.version}, by peft_fx{'' if standing is self else '; undone'}>"


standing: AsPeft | None = None


def as_peft() -> AsPeft:
    """PEFT's names lead to peft_fx, in this process, until `undo()` of what is returned, or the end of its `with` block.

    With PEFT installed: its functions under every name that an imported module has for them, what its `PeftModel` classes
    make, and its tables; methods that there are not here stay PEFT's own. Without PEFT: a module `peft`; call it before
    importing what asks for PEFT. Raises ImportOrderError where that is too late. A second call returns the first one's handle.
    """
    global standing
    if standing is not None:
        return standing
    changes, version = Changes(), answered()
    try:
        there = find_spec("peft") is not None
        if version != installed():
            changes.front(sys.meta_path, Answers(version))
        if not there:
            stand_in(version, changes)
        when_imported(CALLERS | ({"peft": lead} if there else {}), changes)
    except BaseException:
        changes.undo()
        raise
    standing = AsPeft(changes, version)
    return standing


def lead(peft: ModuleType, changes: Changes) -> None:
    from .installed import lead_all  # which is made of the whole face

    lead_all(peft, changes)
