"""What Dynamo leaves to Python: a whole function, where a graph break lies in a loop of it. No backend sees its operators.

What such a function calls is compiled on its own, but for modules of torch.nn, which Dynamo takes as operators of the
caller: `give_frames` makes functions of those too. What it computes itself cannot be adapted: `as_written` finds it.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from types import CodeType, FrameType
from typing import Any

from torch import nn
from torch._dynamo import OptimizedModule
from torch._dynamo.convert_frame import output_codes
from torch._dynamo.resume_execution import TORCH_DYNAMO_RESUME_IN_PREFIX
from torch.utils.hooks import RemovableHandle

from ..store.unwrap import is_compiled_in_place

NO_CHANGE = RemovableHandle(OrderedDict()).id  # of `no_change` among a module's hooks; torch gives it to no other


def running() -> Iterator[tuple[nn.Module, CodeType]]:
    """(module, code) of what runs with a module as its first one among the arguments, innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        values = (frame.f_locals.get(name) for name in code.co_varnames[: code.co_argcount])
        module = next((v for v in values if isinstance(v, nn.Module)), None)
        if module is not None:
            yield module, code
        frame = frame.f_back


def compiled_module() -> nn.Module | None:
    """The outermost module on the stack that `torch.compile` or its own `compile` was called on."""
    found = None
    for module, _ in running():
        if isinstance(module, OptimizedModule) or is_compiled_in_place(module):
            found = module
    return getattr(found, "_orig_mod", found)


def of_torch(module: nn.Module) -> bool:
    """True if the module's forward is torch's own."""
    return type(module).forward.__module__.startswith("torch.nn.")


def give_frames(modules: Iterable[nn.Module]) -> None:
    """Lets Dynamo compile calls of these modules also where their caller runs in Python.

    A module with a hook is called through a function that Dynamo compiles like any other. One hook and one id for all, at
    any time: it guards on both, and would compile a layer's graph anew for each layer, and for each adapter that comes.
    """
    for module in modules:
        module._forward_pre_hooks[NO_CHANGE] = no_change


def no_change(module: nn.Module, args) -> None:
    """The hook."""


def as_written() -> set[nn.Module]:
    """Modules on the stack whose forward, or what Dynamo made of its rest after a graph break, runs as it is, not compiled."""
    found = set()
    for module, code in running():
        if code.co_name.startswith(TORCH_DYNAMO_RESUME_IN_PREFIX):
            if code not in output_codes:
                found.add(module)
            continue
        function: Any = type(module).forward
        while function is not None and getattr(function, "__code__", None) is not code:
            function = getattr(function, "__wrapped__", None)  # what decorators have wrapped
        if function is not None:
            found.add(module)
    return found


def used_by(module: nn.Module) -> Iterator[nn.Module]:
    """The module and those of torch's that it holds."""
    yield module
    for child in module.children():
        if of_torch(child) or type(child).__name__ in ("ModuleList", "ModuleDict"):
            yield from used_by(child)
