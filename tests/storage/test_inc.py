"""Layers of Intel Neural Compressor; the format itself is in test_handpacked.py."""

import handpacked
import packages
import pytest
import torch
from torch import nn

from peft_fx.errors import StorageError
from peft_fx.storage.recognise import recognise
from peft_fx.storage.schemes import scheme

N, K = 96, 128
MODULE = "neural_compressor.torch.algorithms.weight_only.modules"


def made(monkeypatch, **options):
    hand = handpacked.inc(N, K, **options)
    ordered = hand.tensors.pop("g_idx") if not options.get("order") else None
    code = hand.tensors.pop("code", None)
    about = {"bits": hand.facts["bits"], "dtype": hand.facts["type"], "use_optimum_format": hand.facts["optimum"], "group_size": 32,
             "in_features": K, "out_features": N, "compression_dim": 1}  # fmt: skip
    module = packages.layer(monkeypatch, MODULE, ("INCWeightOnlyLinear",), hand.tensors, **about)
    if ordered is not None:
        module.g_idx = None
    return hand, module, code


@pytest.mark.parametrize("options", [
    {"bits": 3}, {"order": True}, {"optimum": False}, {"optimum": False, "zeros": False},
    {"type": "nf4", "optimum": False}, {"type": "fp4", "optimum": False}, {"type": "fp4_e2m1", "optimum": False},
])  # fmt: skip
def test_a_layer_and_its_numbers_replaced(monkeypatch, options):
    hand, module, code = made(monkeypatch, **options)
    held, before, dense = recognise(module), dict(module._buffers), torch.zeros(N, K)
    assert torch.equal(held.dense(), hand.W.float().to(hand.dtype))
    if code is not None:
        assert torch.equal(held.tensors["code"], code)
    module.__dict__["weight"] = dense  # the package keeps that of its first forward
    storage = scheme("inc")
    new = held.again(storage.quantize(held.dense().float() * 0.5, held))
    undo = storage.place(module, "weight", new)
    assert "weight" not in vars(module) and torch.equal(recognise(module).dense(), new.dense())
    undo()
    assert module.weight is dense and all(module._buffers[name] is t for name, t in before.items())


@pytest.mark.parametrize("change", [{"compression_dim": 0}, {"words": torch.int8}])
def test_words_that_are_not_read(monkeypatch, change):
    _, module, _ = made(monkeypatch, optimum=False)
    module.compression_dim = change.get("compression_dim", 1)
    module.qweight = module.qweight.to(change.get("words", torch.int32))
    with pytest.raises(StorageError, match="int32 words along the inputs"):
        recognise(module)


def test_a_difference_of_eight_bits_is_taken_in_eight_bits(monkeypatch):
    """200 - 10 is -66: so the package does, and so its files are read; any such difference can be written again."""
    _, module, _ = made(monkeypatch, bits=8)
    module.qweight.view(torch.uint8).fill_(200)
    module.qzeros.view(torch.uint8).fill_(9)
    held = recognise(module)
    assert torch.equal(held.dense(), (-66 * module.scales[torch.arange(K) // 32]).t())
    assert torch.equal(held.again(scheme("inc").quantize(held.dense(), held)).dense(), held.dense())


@pytest.mark.parametrize("options", [
    {"bits": 4, "use_sym": False}, {"bits": 4, "use_sym": True}, {"bits": 8, "use_sym": True}, {"bits": 8, "use_sym": False},
    {"bits": 3, "use_sym": False}, {"bits": 2, "use_sym": False}, {"dtype": "nf4"}, {"dtype": "fp4"}, {"dtype": "fp4_e2m1"},
])  # fmt: skip
def test_the_package_itself(options):
    torch_api = pytest.importorskip("neural_compressor.torch.quantization")
    net = nn.Sequential(nn.Linear(K, N))
    module = torch_api.convert(
        torch_api.prepare(net, torch_api.RTNConfig(group_size=32, **{"dtype": "int"} | options))
    )[0]
    held, W = recognise(module), module.recover()
    assert torch.equal(held.dense(), W)
    assert torch.equal(
        held.again(scheme("inc").quantize(W.float(), held)).dense(), W
    )  # its own rounding of what is rounded
