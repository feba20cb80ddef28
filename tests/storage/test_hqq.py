"""Layers of hqq; the format itself is in test_handpacked.py."""

import handpacked
import packages
import pytest
import torch
from torch import nn

from peft_fx.errors import StorageError
from peft_fx.storage.recognise import recognise
from peft_fx.storage.schemes import scheme

N, K = 96, 128


def made(monkeypatch, *, floats=False, **meta):
    hand = handpacked.hqq(N, K)
    words = hand.tensors["W_q"].view(torch.float16) if floats else hand.tensors["W_q"]
    meta = {"scale": hand.tensors["scale"], "zero": hand.tensors["zero"], "shape": torch.Size((N, K)), "nbits": 4,
            "packing": "4bit_u8", "view_as_float": floats, "unpack_view_dtype": torch.uint8} | meta  # fmt: skip
    module = packages.layer(monkeypatch, "hqq.core.quantize", ("HQQLinear",), meta=meta, compute_dtype=torch.float32)
    module.W_q = nn.Parameter(words, requires_grad=False)
    return hand, module


@pytest.mark.parametrize("floats", [False, True])
def test_a_layer_and_its_numbers_replaced(monkeypatch, floats):
    hand, module = made(monkeypatch, floats=floats)
    held, W_q, meta = recognise(module), module.W_q, module.meta
    torch.testing.assert_close(held.dense().double(), hand.W, rtol=1e-6, atol=1e-7)
    new = held.again(scheme("hqq").quantize(held.dense() * 0.5, held))
    undo = scheme("hqq").place(module, "weight", new)
    assert torch.equal(recognise(module).dense(), new.dense()) and module.W_q.dtype == W_q.dtype
    undo()
    assert module.W_q is W_q and module.meta is meta


def test_numbers_that_were_made_in_inference_mode_are_ones_that_autograd_saves(monkeypatch):
    with torch.inference_mode():
        scale = torch.full((N * K // 32, 1), 0.01)
    _, module = made(monkeypatch, scale=scale)
    held, x = recognise(module), torch.randn(2, K, requires_grad=True)
    torch.ops.peft_fx.packed_linear(x, list(held.tensors.values()), None, held.text).sum().backward()
    torch.testing.assert_close(x.grad, held.dense().sum(0).expand(2, -1))


def test_a_layer_without_numbers_is_refused(monkeypatch):
    _, module = made(monkeypatch)
    module.meta = None
    with pytest.raises(StorageError, match="not quantized yet"):
        recognise(module)


def test_a_layer_with_quantized_scales_is_refused(monkeypatch):
    _, module = made(monkeypatch)
    del module.meta["zero"]
    with pytest.raises(StorageError, match="quantized or offloaded.*quant_zero=False"):
        recognise(module)


@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1.58, 1])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_package_itself(bits, axis, dtype):
    hqq = pytest.importorskip("hqq.core.quantize")
    config = hqq.BaseQuantizeConfig(nbits=bits, group_size=64, axis=axis)
    module = hqq.HQQLinear(nn.Linear(K, N), quant_config=config, compute_dtype=dtype, device="cpu")
    assert torch.equal(recognise(module).dense(), module.dequantize())
