"""`AllocatorCallback`: a Trainer does for the adapters what their methods ask of a training loop.

    transformers.Trainer(model, arguments, train_dataset=..., callbacks=[AllocatorCallback()])

Without it AdaLoRA keeps all its components.
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from ..verbs.tensors import holder_of


class AllocatorCallback(TrainerCallback):
    """For a PeftModel. What allocators remember is not in a Trainer's checkpoints."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        holder_of(model).forget_importance()  # the numbers may be a checkpoint's now

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        holder_of(model).update_and_allocate(state.global_step)
