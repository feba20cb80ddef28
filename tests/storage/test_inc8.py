"""Intel Neural Compressor's layers of 8-bit floats; the format itself is in test_handpacked.py."""

import handpacked
import packages
import pytest
import torch
from torch import nn

from peft_fx.errors import StorageError
from peft_fx.storage.recognise import recognise
from peft_fx.storage.schemes import scheme

N, K = 96, 128
MODULE = "neural_compressor.torch.algorithms.fp8_quant._quant_common.helper_modules"


def part(**attributes):
    made = nn.Module()
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


def made(monkeypatch, scale=0.0025, inputs=0.03125, use_qdq=True):
    hand = handpacked.inc8(N, K)
    module = packages.layer(
        monkeypatch, MODULE, ("PatchedLinear",), use_qdq=use_qdq,
        dequant_weights=part(scale=scale, hp_dtype=torch.bfloat16), quant_input=part(scale=inputs, lp_dtype=torch.float8_e4m3fn),
    )  # fmt: skip
    module.weight = nn.Parameter(hand.tensors["weight"])
    return hand, module


def test_a_layer_and_its_numbers_replaced(monkeypatch):
    hand, module = made(monkeypatch)
    held, before = recognise(module), module.weight
    assert held.format.facts == hand.facts and torch.equal(held.dense(), hand.W.float().bfloat16())
    new = held.again(scheme("inc8").quantize(held.dense() * 0.5, held))
    undo = scheme("inc8").place(module, "weight", new)
    assert torch.equal(recognise(module).dense(), new.dense()) and isinstance(module.weight, nn.Parameter)
    undo()
    assert module.weight is before


def test_a_scale_for_each_output(monkeypatch):
    scales = torch.rand(N) * 0.01
    hand, module = made(monkeypatch, scale=nn.Parameter(scales))
    W = hand.tensors["weight"].float().t() * scales[:, None]
    assert torch.equal(recognise(module).dense(), W.bfloat16())


@pytest.mark.parametrize("change, said", [
    ({"use_qdq": False}, "use_qdq=True"),
    ({"inputs": torch.ones(2)}, "several scales for its inputs"),
])  # fmt: skip
def test_a_layer_that_cannot_be_read(monkeypatch, change, said):
    with pytest.raises(StorageError, match=said):
        recognise(made(monkeypatch, **change)[1])


def test_the_package_itself(tmp_path):
    torch_api = pytest.importorskip("neural_compressor.torch.quantization")
    config = torch_api.FP8Config(
        fp8_config="E4M3", use_qdq=True, scale_method="maxabs_arbitrary", dump_stats_path=str(tmp_path / "s")
    )
    net, x = torch_api.prepare(nn.Sequential(nn.Linear(K, N)), config), torch.randn(4, K)
    net(x)
    module = torch_api.convert(net)[0]
    held = recognise(module)
    assert torch.equal(held.dense(), module.dequant_weights(module.weight).t())
    y = torch.ops.peft_fx.packed_linear(x, list(held.tensors.values()), module.bias, held.text)
    assert torch.equal(y, module(x))
