"""Functions of libraries that take PEFT's layers apart, or fill them, and ours in their place."""

from __future__ import annotations

from functools import wraps
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .changes import Changes
from .imports import Then

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel
    from transformers.utils.loading_report import LoadStateDictInfo


def transformers_loads(module: ModuleType, changes: Changes) -> None:
    theirs = module.PeftAdapterMixin.load_adapter

    @wraps(theirs)
    def load_adapter(self: PreTrainedModel, *args: Any, **kwargs: Any) -> LoadStateDictInfo:
        from .loading import load_adapter

        return load_adapter(theirs, self, *args, **kwargs)

    changes.attribute(module.PeftAdapterMixin, "load_adapter", load_adapter)


def diffusers_unloads(module: ModuleType, changes: Changes) -> None:
    theirs = module.recurse_remove_peft_layers

    @wraps(theirs)
    def recurse_remove_peft_layers(model: nn.Module) -> nn.Module:
        from ..model.injection import injected, remove_all

        return theirs(model) if injected(model) is None else remove_all(model)

    changes.functions({theirs: recurse_remove_peft_layers})


# their module -> what is done to it; what ours need is imported when they are called: they may be why theirs is imported
CALLERS: dict[str, Then] = {
    "diffusers.utils.peft_utils": diffusers_unloads,
    "transformers.integrations.peft": transformers_loads,
}
