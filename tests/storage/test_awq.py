"""Layers of gptqmodel and autoawq; the format itself is in test_handpacked.py."""

import handpacked
import packages
import pytest
import torch

from peft_fx.errors import StorageError
from peft_fx.storage.recognise import recognise

N, K = 96, 128


def made(monkeypatch, module, *classes, bits=4, **more):
    hand = handpacked.awq(N, K, bits=bits)
    about = {"bits": bits, "w_bit": bits, "in_features": K, "out_features": N}
    return hand, packages.layer(monkeypatch, module, classes, hand.tensors, **about | more)


@pytest.mark.parametrize("module, classes", [
    ("gptqmodel.nn_modules.qlinear.torch_awq", ("AWQuantLinear", "AwqTorchLinear")),
    ("awq.modules.linear.gemm", ("WQLinear_GEMM",)),
])  # fmt: skip
def test_a_layer_of_a_package(monkeypatch, module, classes):
    hand, layer = made(monkeypatch, module, *classes)
    held = recognise(layer)
    assert torch.equal(held.dense(), hand.W.half())
    assert all(held.tensors[name] is layer._buffers[name] for name in hand.tensors)
    assert recognise(layer, "bias") is None


@pytest.mark.parametrize("module, classes, more, said", [
    ("gptqmodel.q", ("AWQuantLinear", "TorchAtenAwqLinear"), {"linear_mode": "inference"}, "has repacked its weight"),
    ("gptqmodel.q", ("AWQuantLinear", "AwqGEMVLinear"), {}, "an? AwqGEMVLinear keeps its weight in its kernel's order"),
    ("awq.q", ("WQLinear_GEMV",), {}, "a WQLinear_GEMV keeps its weight in its kernel's order: load the GEMM version"),
    ("awq.q", ("WQLinear_GEMM",), {"w_bit": 5}, "of 5 bits"),
])  # fmt: skip
def test_a_layer_that_cannot_be_read(monkeypatch, module, classes, more, said):
    with pytest.raises(StorageError, match=said):
        recognise(made(monkeypatch, module, *classes, **more)[1])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_package_itself(bits):
    dequantize = pytest.importorskip("gptqmodel.quantization.awq.utils.packing_utils").dequantize_gemm
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

    module = AwqTorchLinear(bits=bits, group_size=32, sym=False, desc_act=False, in_features=K, out_features=N, bias=True,
                            pack_dtype=torch.int32, register_buffers=True)  # fmt: skip
    for words in (module.qweight, module.qzeros):
        words.random_(-(2**31), 2**31)
    module.scales.uniform_(0.005, 0.02)
    W = dequantize(module.qweight, module.qzeros, module.scales, bits, 32).t()
    assert torch.equal(recognise(module).dense(), W)
