"""Captured tiny models and adapter folders for the tests of the verbs; each model is captured once per process."""

import functools

import torch
from tiny import build
from torch import nn
from transformers.pytorch_utils import Conv1D

import peft_fx


class Mixed(nn.Module):
    """One of each: embedding, grouped convolution, batch norm, dropout, Conv1D, linear without and with bias."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.1)
        self.turned = Conv1D(8, 8)
        self.plain = nn.Linear(8, 8, bias=False)
        self.head = nn.Linear(8, 5)
        self.register_buffer("shift", torch.linspace(-1, 1, 8), persistent=False)

    def forward(self, ids):
        x = self.norm(self.conv(self.embed(ids).mT)).mT.contiguous() + self.shift
        return self.head(self.plain(torch.tanh(self.turned(self.drop(x)))))


def ids(*shape, high=11, seed=0):
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


def lively(model, seed=1):
    """Initial values that differ from 0 and 1, so that no term can hide."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def mixed():
    torch.manual_seed(0)
    return lively(Mixed()).eval()


def model_of(name):
    return mixed() if name == "mixed" else lively(build(name)).eval()


def inputs(name, *shape):
    tokens = ids(*shape or (2, 6))
    return {"ids": tokens} if name == "mixed" else {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def output(graph, name, *shape):
    result = graph(**inputs(name, *shape))
    return result if isinstance(result, torch.Tensor) else result.logits


@functools.cache
def model_and_graph(name):
    model = model_of(name)
    return model, peft_fx.capture(model, kwargs=inputs(name))


def captured(name):
    return model_and_graph(name)[1]


def tuned(graph, config, seed=0, adapter_name="default", **options):
    """`apply`, with every tensor that trains moved away from its initial value. options: of `apply`."""
    torch.manual_seed(seed)
    new = peft_fx.apply(graph, {"peft_type": "LORA", **config}, adapter_name, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in new.named_parameters():
            if name.startswith(f"peft_fx.adapters.{adapter_name}."):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return new


def folder_of(path, graph, config, seed=0):
    return peft_fx.save_adapter(tuned(graph, config, seed), path)


def bits(graph):
    """Every tensor that a graph module holds, by name, copied; ties and shelves included."""
    named = [*graph.named_parameters(remove_duplicate=False), *graph.named_buffers(remove_duplicate=False)]
    return {name: tensor.detach().clone() for name, tensor in named}


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def loss_of(graph, name, *shape):
    return output(graph, name, *shape).square().mean()


def gradients(graph):
    return {name: p.grad for name, p in graph.named_parameters() if p.grad is not None}
