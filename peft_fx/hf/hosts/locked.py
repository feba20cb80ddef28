"""Calls of modules as forwards to the lock: what is called inside sees one snapshot, and no write comes between."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch._dynamo.eval_frame import skip_code

if TYPE_CHECKING:
    from .hosts import Hosts


class Locked:
    """What a module has in place of its `_call_impl`. A torch.compile of the module runs it, and compiles what it calls."""

    is_lock = True

    def __init__(self, hosts: Hosts, module: nn.Module):
        self.hosts, self.module, self.around = hosts, module, any(m is hosts.model for m in module.modules())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hosts, function, call = self.hosts, self.module._call_impl, None
        if torch.compiler.is_dynamo_compiling():
            return function(*args, **kwargs)
        if self.around:
            hosts.begins(self.module)
        try:
            call = hosts.sharing.begin(bool(get_eval_frame_callback()))
            return function(*args, **kwargs)
        finally:
            hosts.sharing.end(call)


skip_code(Locked.__call__.__code__)


def lock(hosts: Hosts, module: nn.Module) -> None:
    """A module that its owner compiles stays compiled."""
    there = module.__dict__.get("_compiled_call_impl")
    if there is None or (isinstance(there, Locked) and there.hosts is not hosts):
        module._compiled_call_impl = Locked(hosts, module)
