"""torchao's subclasses against torchao itself and dense definitions in float64."""

import pytest
import torch
from packed_checks import check_packed, check_place
from torch import nn
from torch.nn import functional as F

from peft_fx.errors import StorageError
from peft_fx.storage.packed import Packed
from peft_fx.storage.recognise import recognise
from peft_fx.storage.schemes import scheme

pytest.importorskip("torchao")
from torchao.float8.inference import Float8MMConfig
from torchao.quantization import (
    Float8Tensor,
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8Tensor,
    Int8WeightOnlyConfig,
    IntxUnpackedToInt8Tensor,
    IntxWeightOnlyConfig,
    PerAxis,
    PerGroup,
    PerRow,
    PerTensor,
    quantize_,
)
from torchao.quantization.quant_primitives import MappingType
from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs

WEIGHTS = {
    "int8": Int8WeightOnlyConfig(version=2),
    "int8 group": Int8WeightOnlyConfig(version=2, granularity=PerGroup(32)),
    "int8 tensor": Int8WeightOnlyConfig(version=2, granularity=PerTensor()),
    "int4": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
    "int2 row": IntxWeightOnlyConfig(weight_dtype=torch.int2, granularity=PerAxis(0)),
    "int3 asymmetric": IntxWeightOnlyConfig(weight_dtype=torch.int3, granularity=PerGroup(32), mapping_type=MappingType.ASYMMETRIC),
    "float8": Float8WeightOnlyConfig(),
}  # fmt: skip
INPUTS = {
    "int8": Int8DynamicActivationInt8WeightConfig(version=2),
    "int8 asymmetric": Int8DynamicActivationInt8WeightConfig(version=2, act_mapping_type=MappingType.ASYMMETRIC),
    "int4": Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(32)),
    "float8 row": PerRow(),  # quantize_ asks for a GPU; the tensor does not
    "float8 tensor": PerTensor(),
}


def layer(config, dtype=torch.float32):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 48, dtype=dtype))
    if isinstance(config, PerRow | PerTensor):
        inputs = QuantizeTensorToFloat8Kwargs(granularity=config, mm_config=Float8MMConfig(use_fast_accum=True))
        w = Float8Tensor.from_hp(
            module[0].weight.data, granularity=config, mm_config=inputs.mm_config, act_quant_kwargs=inputs
        )
        module[0].weight = nn.Parameter(w, requires_grad=False)
    else:
        quantize_(module, config)
    return module[0].requires_grad_(False)


def float64(w):
    """(q - z) s of each block, from the definition."""
    grid = [n // b for n, b in zip(w.shape, w.block_size, strict=True)]

    def full(t):
        return t.double().reshape(grid).repeat_interleave(w.block_size[0], 0).repeat_interleave(w.block_size[1], 1)

    zero = getattr(w, "zero_point", None)
    return (w.qdata.double() - (0 if zero is None else full(zero))) * full(w.scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_have_the_package_s_bits(name, dtype):
    module = layer(WEIGHTS[name], dtype)
    packed = recognise(module)
    dense = check_packed(packed)
    assert torch.equal(dense, module.weight.dequantize())
    assert torch.allclose(dense.double(), float64(module.weight), rtol=4 * torch.finfo(dtype).eps)
    assert packed.tensors["qdata"] is module.weight.qdata


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", WEIGHTS)
def test_quantize_makes_what_the_package_makes(name, dtype):
    module = layer(WEIGHTS[name], dtype)
    packed, w = recognise(module), module.weight
    W = torch.randn(48, 64).to(dtype)
    if isinstance(w, IntxUnpackedToInt8Tensor):
        kind = MappingType.ASYMMETRIC if w.zero_point.any() else MappingType.SYMMETRIC
        theirs = IntxUnpackedToInt8Tensor.from_hp(W, w.block_size, w.target_dtype, mapping_type=kind)
    else:
        by = {1: PerRow(), 48: PerTensor()}[w.block_size[0]]
        by = PerGroup(32) if w.block_size[1] == 32 else by
        theirs = (Float8Tensor if isinstance(w, Float8Tensor) else Int8Tensor).from_hp(W, granularity=by)
    ours = scheme("torchao").quantize(W, packed)
    for key, tensor in ours.items():
        assert tensor.dtype == getattr(theirs, key).dtype and torch.equal(tensor, getattr(theirs, key)), key
    check_place(module, "weight", packed, ours)
    y = layer(WEIGHTS[name], dtype)
    scheme("torchao").place(y, "weight", packed.again(ours))
    x = torch.randn(3, 64, dtype=dtype)
    expected = F.linear(x.double(), theirs.dequantize().double(), y.bias.double())
    assert (y(x).double() - expected).norm() < 2 * torch.finfo(dtype).eps * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", INPUTS)
def test_inputs_are_rounded_as_the_package_does(name, dtype):
    if "float8" in name and dtype == torch.float32:
        pytest.skip("torchao multiplies float8 in bfloat16 alone")
    module = layer(INPUTS[name], dtype)
    packed = recognise(module)
    dense = check_packed(packed)
    x = torch.randn(2, 7, 64, dtype=dtype)
    theirs, apart = module(x).double(), F.linear(x, dense, module.bias).double()
    ours = torch.ops.peft_fx.packed_linear(x, list(packed.tensors.values()), module.bias, packed.text).double()
    bound = 1e-6 if dtype == torch.float32 else 8e-3
    assert (ours - theirs).norm() < bound * theirs.norm()
    if dtype == torch.float32 or "float8" in name:  # bfloat16's own rounding is as large as int8's
        assert (apart - theirs).norm() > 3 * (ours - theirs).norm()


def test_other_roundings_of_inputs_are_refused():
    module = layer(WEIGHTS["int8"])
    module.weight.act_pre_scale = torch.ones(64)
    with pytest.raises(StorageError, match="act_pre_scale"):
        recognise(module)


def test_an_embedding_and_an_expert_stack():
    torch.manual_seed(0)
    table = nn.Embedding(48, 64)
    table.weight = nn.Parameter(Int8Tensor.from_hp(table.weight.data, PerRow()), requires_grad=False)
    check_packed(recognise(table))
    stack = nn.Module()
    stack.weight = nn.Parameter(Int8Tensor.from_hp(torch.randn(3, 8, 16), PerRow()), requires_grad=False)
    packed = recognise(stack)
    assert isinstance(packed, Packed) and torch.equal(check_packed(packed), stack.weight.dequantize())


@pytest.mark.parametrize("name", WEIGHTS)
def test_rows_of_zeros_stay(name):
    packed = recognise(layer(WEIGHTS[name]))
    W = torch.randn(48, 64)
    W[0] = 0
    dense = packed.again(scheme("torchao").quantize(W, packed)).dense()
    assert not dense[0].any() and dense.isfinite().all()
