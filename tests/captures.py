"""What the tests of `capture` share: calls, inputs, and the check that an adapter acts on a captured graph."""

import copy

import torch
from torch import nn

import peft_fx

LORA = {"peft_type": "LORA", "r": 2, "init_lora_weights": False}
X, Y, Z = torch.randn(3, 4), torch.randn(3, 4), torch.randn(3, 4)


def capture(model, *args, **options):
    return peft_fx.capture(model, args, **options)


def assert_adapts(graph, model, target, inputs):
    """LoRA on `target` equals the model with the update added to that weight."""
    tuned = peft_fx.apply(graph, {**LORA, "target_modules": [target]})
    A, B = [tuned.get_parameter(f"peft_fx.adapters.default.{target}.on_weight.lora_{x}") for x in "AB"]
    updated = copy.deepcopy(model)
    weight = updated.get_submodule(target).weight
    with torch.no_grad():
        weight += (8 / 2) * (B.flatten(1) @ A.flatten(1)).reshape(weight.shape)
    torch.testing.assert_close(tuned(*inputs), updated(*inputs), atol=1e-5, rtol=1e-5)


class Signature(nn.Module):
    """A linear layer, which subclasses call in the way that a test needs."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)


class Single(Signature):
    def forward(self, x):
        return (self.linear(x),)
