"""compressed-tensors: the stream of bits against one written out, and layers against the package where it is installed."""

import pytest
import torch
from packed_checks import check_packed, check_place
from torch import nn
from torch.nn import functional as F

from peft_fx.errors import StorageError
from peft_fx.storage.compressed_tensors import in_words, unpacked
from peft_fx.storage.formats import Format
from peft_fx.storage.packed import Packed
from peft_fx.storage.recognise import recognise
from peft_fx.storage.schemes import scheme

ROWS, COLUMNS = 24, 96


def by_hand(q, bits):
    """Words of codes, bit by bit."""
    words = []
    for row in q.tolist():
        stream = "".join(format(code + 2 ** (bits - 1), f"0{bits}b")[::-1] for code in row)
        stream += "0" * (-len(stream) % 32)
        found = [int(stream[i : i + 32][::-1], 2) for i in range(0, len(stream), 32)]
        words.append([w - 2**32 if w >= 2**31 else w for w in found])
    return torch.tensor(words, dtype=torch.int32)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [96, 41])
def test_words(bits, columns):
    torch.manual_seed(bits)
    q = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (5, columns), dtype=torch.int8)
    words = by_hand(q, bits)
    assert torch.equal(unpacked(words, bits, columns), q) and torch.equal(in_words(q, bits), words)


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("bits", [3, 4])
def test_a_definition_in_float64(bits, ordered):
    torch.manual_seed(0)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    q = torch.randint(low, high, (ROWS, COLUMNS), dtype=torch.int8)
    z = torch.randint(low, high, (ROWS, 3), dtype=torch.int8)
    s = torch.rand(ROWS, 3) + 0.1
    group = torch.arange(COLUMNS) // 32
    tensors = {"packed": by_hand(q, bits), "scale": s, "zero": by_hand(z.t(), bits).t()}
    if ordered:
        group = group[torch.randperm(COLUMNS)]
        tensors["group"] = group.int()
    facts = {"bits": bits, "block": [1, 32], "tensors": [*tensors]}
    packed = Packed(Format("compressed_tensors", (ROWS, COLUMNS), torch.float32, facts), tensors)
    dense = check_packed(packed)
    assert torch.allclose(dense.double(), (q.double() - z.double()[:, group]) * s.double()[:, group], atol=1e-6)
    assert torch.equal(scheme("compressed_tensors").quantize(dense, packed)["packed"], tensors["packed"])


INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel"}
FLOAT8 = {"num_bits": 8, "type": "float", "strategy": "channel"}
BY_TOKEN = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
LAYERS = {
    "int4": (INT4, None, "pack-quantized"),
    "int4 asymmetric": (INT4 | {"symmetric": False}, None, "pack-quantized"),
    "int3": (INT4 | {"num_bits": 3}, None, "pack-quantized"),
    "int8 packed": (INT8, None, "pack-quantized"),
    "int8 asymmetric": (INT8 | {"symmetric": False}, None, "int-quantized"),
    "int8 whole": (INT8 | {"strategy": "tensor"}, None, "int-quantized"),
    "int8, inputs": (INT8, BY_TOKEN, "int-quantized"),
    "int8, asymmetric inputs": (INT8, BY_TOKEN | {"symmetric": False}, "int-quantized"),
    "float8": (FLOAT8, None, "float-quantized"),
    "float8, inputs": (FLOAT8, BY_TOKEN | {"type": "float"}, "float-quantized"),
    "float8 blocks": (FLOAT8 | {"strategy": "block", "block_structure": [16, 64]}, None, "float-quantized"),
}  # fmt: skip


def layer(name, dtype=torch.float32):
    """(compressed layer, the same after the package decompressed it)."""
    q = pytest.importorskip("compressed_tensors.quantization")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    weights, inputs, form = LAYERS[name]
    torch.manual_seed(0)
    module = nn.Linear(COLUMNS, ROWS, dtype=dtype).requires_grad_(False)
    how = q.QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs, format=form)
    q.initialize_module_for_quantization(module, how, force_zero_point=True)
    fit(module, how.weights)
    compressors.compress_module(module)
    again = nn.Linear(COLUMNS, ROWS, dtype=dtype).requires_grad_(False)
    q.initialize_module_for_quantization(again, how, force_zero_point=True)
    fit(again, how.weights, module)
    compressors.compress_module(again)
    compressors.decompress_module(again)
    return module, again


def fit(module, weights, like=None):
    """Scales by the largest number of each block; the weight of another layer's before it is compressed."""
    from compressed_tensors.quantization.utils import calculate_qparams

    if like is not None:
        module.load_state_dict(like.kept)
        return
    W, scale = module.weight.data, module.weight_scale
    grid = scale.shape if scale.ndim == 2 else (1, 1)
    height, width = -(-ROWS // grid[0]), -(-COLUMNS // grid[1])
    if getattr(weights, "block_structure", None):
        height, width = weights.block_structure
    padded = F.pad(W, (0, grid[1] * width - COLUMNS, 0, grid[0] * height - ROWS))
    blocks = padded.reshape(grid[0], height, grid[1], width)
    s, z = calculate_qparams(blocks.amin((1, 3)), blocks.amax((1, 3)), weights)
    scale.data.copy_(s.reshape(scale.shape))
    module.weight_zero_point.data.copy_(z.reshape(scale.shape))
    module.kept = {n: t.clone() for n, t in module.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
def test_bits_are_the_package_s(name, dtype):
    module, again = layer(name, dtype)
    packed = recognise(module)
    dense = check_packed(packed)
    assert dense.dtype == dtype and torch.equal(dense, again.weight)
    assert recognise(again) is None  # dense now
    if "inputs" in packed.format.facts and dtype == torch.float32:
        from compressed_tensors.quantization.lifecycle.forward import forward_quantize

        x = torch.randn(2, 3, COLUMNS)  # of a matrix the package takes all rows for one
        seen = forward_quantize(again, x, "input", again.quantization_scheme.input_activations)
        theirs = F.linear(seen, dense, module.bias)
        ours = torch.ops.peft_fx.packed_linear(x, list(packed.tensors.values()), module.bias, packed.text)
        assert torch.allclose(ours, theirs, atol=1e-5)
        assert not torch.allclose(F.linear(x, dense, module.bias), theirs, atol=1e-4)


@pytest.mark.parametrize("name", LAYERS)
def test_quantize_keeps_the_scales(name):
    module, _ = layer(name)
    packed = recognise(module)
    W = packed.dense() + 0.3 * packed.dense().abs().amin() * torch.randn(ROWS, COLUMNS)
    W = W.clamp(packed.dense().min(), packed.dense().max())
    new = scheme("compressed_tensors").quantize(W, packed)
    assert torch.equal(new["scale"], packed.tensors["scale"])
    assert (packed.again(new).dense() - W).abs().max() <= (
        0.5001 * new["scale"].max() if "int" in name else 0.04 * W.abs().max()
    )
    check_place(module, "weight", packed, new)


def test_what_is_refused():
    module, _ = layer("int8, inputs")
    module.quantization_scheme.input_activations.dynamic = False
    with pytest.raises(StorageError, match="fixed scales"):
        recognise(module)
    module, _ = layer("int4")
    module.quantization_scheme.format = "nvfp4-pack-quantized"
    with pytest.raises(StorageError, match="nvfp4"):
        recognise(module)
