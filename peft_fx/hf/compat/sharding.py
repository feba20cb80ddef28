"""What FSDP shards on its own, and models that it has sharded."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from ...errors import WrongTypeError
from ...store.unwrap import wrappers

NAMES = "FSDP_TRANSFORMER_CLS_TO_WRAP"  # accelerate's variable


def fsdp_auto_wrap_policy(model: nn.Module) -> ModuleWrapPolicy:
    """The classes of layers that the environment names, separated by commas, else those that the model says are not to be split.

    Adapters are not among them: they stay in the outermost unit, which FSDP 1 makes with use_orig_params=True alone, since
    they are trained and what else is in it is not. Raises TypeError for a class that the model has no module of.
    """
    named = os.environ.get(NAMES) or ",".join(sorted(getattr(model, "_no_split_modules", None) or ()))
    classes = {type(m).__name__: type(m) for m in model.modules()}
    wanted = [name.strip() for name in named.split(",") if name.strip()]
    missing = [name for name in wanted if name not in classes]
    if missing or not wanted:
        raise WrongTypeError(
            f"Could not find the transformer layer class to wrap in the model: {', '.join(missing) or 'none is named'}; set "
            f"{NAMES} to classes of its modules"
        )
    return ModuleWrapPolicy({classes[name] for name in wanted})


@contextmanager
def gathered(model: nn.Module) -> Iterator[bool]:
    """Inside the block a model that FSDP 1 has sharded has its whole tensors; what is written into them stays.

    Yields whether it is one. All processes have to come here, as for its state dict.
    """
    outermost = next((m for m in wrappers(model) if isinstance(m, FullyShardedDataParallel)), None)
    if outermost is None:
        yield False
    else:
        with FullyShardedDataParallel.summon_full_params(outermost):
            yield True
