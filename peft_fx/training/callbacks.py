"""`AllocatorCallback`: a Trainer does for the adapters what their methods ask of a training loop.

    transformers.Trainer(model, arguments, train_dataset=..., callbacks=[AllocatorCallback()])

Without it AdaLoRA keeps all its components, and its loss has no orthogonality term.
"""

from __future__ import annotations

from transformers import TrainerCallback

from .allocators import Allocator, allocators, penalty


class AllocatorCallback(TrainerCallback):
    """allocators: adapter -> its allocator, once training has begun. What they remember is not in a Trainer's checkpoints."""

    def __init__(self):
        self.allocators: dict[str, Allocator] = {}
        self.hook = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Adapters' methods start with the tensors that the checkpoint, if any, has just filled."""
        self.allocators = allocators(model)
        self.hook = model.register_forward_hook(with_penalty)

    def on_optimizer_step(self, args, state, control, **kwargs):
        for allocator in self.allocators.values():
            allocator.update_and_allocate(state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        self.hook.remove()


def with_penalty(model, inputs, outputs):
    """The model's outputs, with what methods add to the loss; evaluation's loss has it too, as in PEFT."""
    if getattr(outputs, "loss", None) is not None:
        outputs.loss = outputs.loss + penalty(model)
    return outputs
