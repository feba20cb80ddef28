"""MXFP4: against transformers' reader of gpt-oss' checkpoints, a definition in float64, and compressed-tensors where it is installed."""

from types import SimpleNamespace

import pytest
import torch
from packed_checks import check_packed, check_place
from torch import nn

from peft_fx.errors import StorageError
from peft_fx.storage.mxfp4 import packed_of
from peft_fx.storage.recognise import recognise
from peft_fx.storage.schemes import scheme

VALUES = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]


def random(*shape, groups=3):
    torch.manual_seed(0)
    blocks = torch.randint(0, 256, (*shape, groups, 16), dtype=torch.uint8)
    return blocks, torch.randint(110, 135, (*shape, groups), dtype=torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_definition_in_float64(dtype):
    blocks, scales = random(16)
    packed = packed_of(blocks.flatten(-2), scales, dtype)
    dense = check_packed(packed)
    codes = torch.stack([blocks % 16, blocks // 16], -1).reshape(16, -1, 32).long()
    expected = torch.tensor(VALUES, dtype=torch.float64)[codes] * 2.0 ** (scales.double()[..., None] - 127)
    assert torch.equal(dense.double(), expected.reshape(16, -1))
    assert packed.tensors["blocks"].data_ptr() == blocks.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_of_gpt_oss(dtype):
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    blocks, scales = random(2, 8)
    packed = packed_of(blocks, scales, dtype, transposed=True)
    dense = check_packed(packed)
    assert dense.shape == (2, 96, 8) and torch.equal(
        dense, mxfp4.convert_moe_packed_tensors(blocks, scales, dtype=dtype)
    )
    new = scheme("mxfp4").quantize(dense, packed)
    assert torch.equal(packed.again(new).dense(), dense)  # a number of the grid is kept


def test_quantize_to_the_nearest():
    blocks, scales = random(16)
    packed = packed_of(blocks, scales, torch.float32)
    W = torch.randn(16, 96)
    W[0, :32] = 0
    W[1, :32] = torch.tensor([6.0, -6.0]).repeat(16) / 8  # the largest number at a power of two
    new = scheme("mxfp4").quantize(W, packed)
    groups, s = W.reshape(16, 3, 32), 2.0 ** (new["scales"].double() - 127)
    largest = groups.abs().amax(2).double()
    assert (largest <= 6 * s).all() and (largest > 3 * s)[largest > 0].all()
    grid = torch.tensor(VALUES, dtype=torch.float64) * s[..., None, None]
    best = (groups.double()[..., None] - grid).abs().amin(-1)
    assert torch.equal((packed.again(new).dense().reshape(16, 3, 32) - groups).abs().double(), best)


def test_4_bit_layers_of_transformers():
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    config = SimpleNamespace(hidden_size=64, num_local_experts=2, moe_intermediate_size=32, hidden_act="silu")
    module = fp8.FP8Experts(config, scale_fmt="ue8m0", expert_dtype="fp4").requires_grad_(False)
    for name in ("gate_up_proj", "down_proj"):
        w, s = module._parameters[name], module._parameters[f"{name}_scale_inv"]
        w.data = torch.randint(-128, 128, w.shape, dtype=torch.int8)
        s.data = torch.randint(110, 135, s.shape, dtype=torch.uint8).view(s.dtype)
        packed = recognise(module, name)
        dense = check_packed(packed)
        assert torch.equal(dense, fp8.Fp8Dequantize(None)._dequantize_one(w, s, torch.float32))
        check_place(module, name, packed, scheme("mxfp4").quantize(torch.randn(dense.shape), packed))
    module.down_proj_scale_inv.data = torch.rand(module.down_proj_scale_inv.shape)
    with pytest.raises(StorageError, match="float32 are not read"):
        recognise(module, "down_proj")


def test_a_layer_of_compressed_tensors():
    q = pytest.importorskip("compressed_tensors.quantization")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    from compressed_tensors.quantization.utils import calculate_qparams

    def layer():
        torch.manual_seed(0)
        module = nn.Linear(96, 16, dtype=torch.bfloat16).requires_grad_(False)
        weights = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
        how = q.QuantizationScheme(targets=["Linear"], weights=weights, format="mxfp4-pack-quantized")
        q.initialize_module_for_quantization(module, how)
        blocks = module.weight.reshape(16, 3, 32)
        scale, _ = calculate_qparams(blocks.amin(2), blocks.amax(2), how.weights)
        module.weight_scale.data.copy_(scale)
        compressors.compress_module(module)
        return module

    module, again = layer(), layer()
    compressors.decompress_module(again)
    packed = recognise(module)
    assert torch.equal(check_packed(packed), again.weight)
    check_place(module, "weight", packed, scheme("mxfp4").quantize(torch.randn(16, 96), packed))


def test_what_is_refused():
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    config = SimpleNamespace(num_local_experts=2, intermediate_size=32, hidden_size=64)
    with pytest.raises(StorageError, match="dequantize=True"):
        recognise(mxfp4.Mxfp4GptOssExperts(config), "gate_up_proj")
    blocks, scales = random(16)
    with pytest.raises(StorageError, match=r"expected \(16, 2, 16\)"):
        packed_of(blocks, scales[:, :2], torch.float32)
