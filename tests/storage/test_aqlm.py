"""Layers of aqlm; the format itself is in test_handpacked.py."""

import os

import handpacked
import packages
import pytest
import torch

from peft_fx.storage.recognise import recognise


def made(monkeypatch, shape, *, ran=False, turned=False):
    hand = handpacked.aqlm(*shape)
    if turned:
        hand.tensors["codes"] = hand.tensors["codes"].transpose(0, 1).contiguous()
    about = {
        "out_features": shape[0],
        "in_features": shape[1],
        "out_group_size": 1,
        "codebook_size": 256,
        "gemv_op": print if ran else None,
    }
    return hand, packages.layer(monkeypatch, "aqlm.inference", ("QuantizedLinear",), hand.tensors, **about)


@pytest.mark.parametrize("shape", [(64, 128), (16, 128)], ids=["not square", "as many groups of outputs as of inputs"])
@pytest.mark.parametrize("ran", [False, True])
def test_codes_are_read_before_and_after_the_package_has_turned_them(monkeypatch, shape, ran):
    hand, module = made(monkeypatch, shape, ran=ran, turned=ran)
    held = recognise(module)
    torch.testing.assert_close(held.dense().double(), hand.W, rtol=1e-6, atol=1e-7)
    assert recognise(module, "codes") is None


@pytest.mark.parametrize("books, bits", [(1, 8), (2, 8), (2, 12)])
def test_the_package_itself(monkeypatch, books, bits):
    monkeypatch.setitem(os.environ, "NUMBA_NUM_THREADS", "1")
    aqlm = pytest.importorskip("aqlm")
    hand = handpacked.aqlm(64, 128, bits=bits, codebooks=books)
    module = aqlm.QuantizedLinear(128, 64, 8, 1, books, bits, bias=False, dtype=torch.float32)
    for name, tensor in hand.tensors.items():
        getattr(module, name).data = tensor
    W = aqlm.utils._dequantize_weight(
        aqlm.utils.unpack_int_data(module.codes.data, bits), module.codebooks, module.scales
    )
    assert torch.equal(recognise(module).dense(), W)
    with torch.no_grad():
        module(torch.randn(3, 128))
    assert torch.equal(recognise(module).dense(), W)
