"""Tensors in the place of a module's, and the objects that it had back."""

import torch
from torch import nn

from peft_fx.storage.placing import exchange


def test_parameters_and_buffers_come_back_as_they_were():
    module = nn.BatchNorm1d(3)
    weight, mean = module.weight, module.running_mean
    undo = exchange(module, {"weight": torch.zeros(3), "running_mean": torch.ones(3)})
    assert isinstance(module.weight, nn.Parameter) and not module.weight.requires_grad and not module.weight.any()
    assert torch.equal(module.running_mean, torch.ones(3)) and "running_mean" in module.state_dict()
    undo()
    assert module.weight is weight and module.running_mean is mean
