"""NF4Tensor against torchao and the definition in float64."""

import pytest
import torch
from packed_checks import check_packed, check_place
from torch import nn
from torch.nn import functional as F

from peft_fx.storage.recognise import recognise
from peft_fx.storage.schemes import scheme

pytest.importorskip("torchao")
from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

SHAPE = (64, 256)


def layer(dtype, seed=0):
    torch.manual_seed(seed)
    module = nn.Linear(SHAPE[1], SHAPE[0], dtype=dtype)
    module.weight = nn.Parameter(to_nf4(module.weight.data, 64, 64), requires_grad=False)
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_are_the_package_s(dtype):
    module = layer(dtype)
    w = module.weight
    packed = recognise(module)
    dense = check_packed(packed)
    assert torch.equal(dense, w.get_original_weight())
    x = torch.randn(3, SHAPE[1], dtype=dtype)
    assert torch.equal(F.linear(x, w) + module.bias, F.linear(x, dense) + module.bias)
    if dtype == torch.float32:
        scale = (
            w.quantized_scalers.double() / w.quantization_factor.double().repeat_interleave(64)
        ) + w.scaler_mean.double()
        codes = torch.stack([w.quantized_data // 16, w.quantized_data % 16], 1).reshape(-1).long()
        expected = (w.nf4.double()[codes].reshape(-1, 64) * scale[:, None]).reshape(SHAPE)
        assert torch.allclose(dense.double(), expected, rtol=1e-6)


def test_quantize_makes_what_the_package_makes():
    module = layer(torch.float32)
    packed = recognise(module)
    W = torch.randn(SHAPE)
    ours, theirs = scheme("torchao_nf4").quantize(W, packed), to_nf4(W, 64, 64)
    for key, tensor in ours.items():
        assert torch.equal(tensor, getattr(theirs, key)), key
    widest = (packed.tensors["nf4"].diff().max() / 2).item()  # half of the widest gap between codes, in units of absmax
    error = (packed.again(ours).dense() - W).reshape(-1, 64).abs().amax(1)
    absmax = W.reshape(-1, 64).abs().amax(1)
    assert (error <= (widest + 0.01) * absmax).all()
    check_place(module, "weight", packed, ours)
