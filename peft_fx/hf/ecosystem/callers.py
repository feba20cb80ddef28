"""Functions of libraries that take PEFT's layers apart, or fill them, and ours in their place."""

from __future__ import annotations

from functools import wraps
from types import ModuleType

from .changes import Changes
from .imports import Then


def transformers_loads(module: ModuleType, changes: Changes) -> None:
    from .loading import loading

    mixin = module.PeftAdapterMixin
    changes.attribute(mixin, "load_adapter", loading(mixin.load_adapter))


def diffusers_unloads(module: ModuleType, changes: Changes) -> None:
    from ..model.injection import injected, remove_all

    theirs = module.recurse_remove_peft_layers

    @wraps(theirs)
    def recurse_remove_peft_layers(model):
        return theirs(model) if injected(model) is None else remove_all(model)

    changes.functions({theirs: recurse_remove_peft_layers})


# their module -> what is done to it; what that needs is imported then: torch takes a second
CALLERS: dict[str, Then] = {
    "diffusers.utils.peft_utils": diffusers_unloads,
    "transformers.integrations.peft": transformers_loads,
}
