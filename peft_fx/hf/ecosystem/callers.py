"""Functions of libraries that take PEFT's layers apart; ours take their place, now or when their modules are imported."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial, wraps
from importlib.abc import MetaPathFinder

from torch import nn

from ..model.injection import injected, remove_all
from .changes import Changes


def transformers_loads(module, changes: Changes) -> None:
    from .loading import loading

    mixin = module.PeftAdapterMixin
    changes.attribute(mixin, "load_adapter", loading(mixin.load_adapter))


def diffusers_unloads(module, changes: Changes) -> None:
    theirs = module.recurse_remove_peft_layers

    @wraps(theirs)
    def recurse_remove_peft_layers(model: nn.Module) -> nn.Module:
        return theirs(model) if injected(model) is None else remove_all(model)

    changes.functions({theirs: recurse_remove_peft_layers})


# module -> what is done to it
CALLERS: dict[str, Callable] = {
    "diffusers.utils.peft_utils": diffusers_unloads,
    "transformers.integrations.peft": transformers_loads,
}


def lead(changes: Changes) -> None:
    for name, then in CALLERS.items():
        if name in sys.modules:
            then(sys.modules[name], changes)
    changes.front(sys.meta_path, WhenImported({n: partial(then, changes=changes) for n, then in CALLERS.items()}))


class WhenImported(MetaPathFinder):
    """An entry of `sys.meta_path`: module -> what is called with it once it has run. Other entries find and run it."""

    def __init__(self, then: dict[str, Callable]):
        self.then = then

    def find_spec(self, name, path=None, target=None):
        if name not in self.then:
            return None
        others = (f for f in sys.meta_path if f is not self)
        spec = next((s for f in others if (s := f.find_spec(name, path, target))), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module):
                run(module)
                self.then[name](module)

            spec.loader.exec_module = exec_module
        return spec
