"""transformers' `EetqLinear`, which is there without the package; the format itself is in test_handpacked.py."""

import handpacked
import packages
import pytest
import torch
from torch import nn
from transformers.integrations.eetq import EetqLinear

from peft_fx.errors import StorageError
from peft_fx.storage.recognise import recognise
from peft_fx.storage.schemes import scheme

N, K = 96, 128


def transformers_layer(hand):
    module = EetqLinear(K, N)
    module.weight = nn.Parameter(hand.tensors["weight"], requires_grad=False)
    module.weight_scales = nn.Parameter(hand.tensors["weight_scales"], requires_grad=False)
    return module


def test_a_layer_of_transformers_and_its_numbers_replaced():
    hand = handpacked.eetq(N, K)
    module = transformers_layer(hand)
    before, held = dict(module._parameters), recognise(module)
    assert torch.equal(held.dense(), hand.W.half())
    new = held.again(scheme("eetq").quantize(held.dense() * 0.5, held))
    undo = scheme("eetq").place(module, "weight", new)
    assert torch.equal(recognise(module).dense(), new.dense())
    assert {n: type(p) for n, p in module._parameters.items()} == {n: type(p) for n, p in before.items()}
    undo()
    assert all(module._parameters[name] is p for name, p in before.items())


def test_a_layer_of_the_package_and_its_numbers_replaced(monkeypatch):
    hand = handpacked.eetq(N, K)
    tensors = {"qweight": hand.tensors["weight"], "weight_scales": hand.tensors["weight_scales"]}
    module = packages.layer(monkeypatch, "eetq.modules.qlinear", ("W8A16Linear",), tensors)
    held = recognise(module)
    assert torch.equal(held.dense(), hand.W.half())
    undo = scheme("eetq").place(module, "weight", held.again(scheme("eetq").quantize(held.dense() * 0.5, held)))
    assert not torch.equal(recognise(module).dense(), held.dense())
    undo()
    assert module.qweight is tensors["qweight"] and module.weight_scales is tensors["weight_scales"]


def test_the_scale_is_the_rows_largest_over_128():
    W, held = torch.randn(N, K), recognise(transformers_layer(handpacked.eetq(N, K)))
    made = scheme("eetq").quantize(W, held)
    scale = W.abs().amax(1) / 128
    codes = (W / scale[:, None]).round().clamp(-128, 127)
    assert torch.equal(made["weight_scales"], scale.half())
    assert torch.equal(held.again(made).dense(), codes.half() * scale.half()[:, None])


@pytest.mark.parametrize("shape", [(100, 96), (128, 95)])
def test_a_shape_that_tiles_do_not_fill(shape):
    with pytest.raises(StorageError, match="inputs go by 64, outputs by 2"):
        recognise(EetqLinear(*shape))
