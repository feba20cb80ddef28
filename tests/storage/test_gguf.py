"""GGUF's blocks, bit for bit against the `gguf` package, transformers and diffusers; a definition of our own for one type."""

import pytest
import torch
from packed_checks import check_packed, check_place
from torch import nn
from torch.nn import functional as F

from peft_fx.errors import StorageError
from peft_fx.storage.gguf import NAMES, QUANTIZED, SIZES, packed_of
from peft_fx.storage.recognise import recognise
from peft_fx.storage.schemes import scheme
from peft_fx.storage.twins import twin

SHAPE = (12, 512)


def blocks_of(kind, shape=SHAPE):
    """Random bytes, with scales that are finite."""
    torch.manual_seed(0)
    weights, size, _ = SIZES[kind]
    blocks = torch.randint(0, 256, (*shape[:-1], shape[-1] // weights, size), dtype=torch.uint8)
    for at in {"Q6_K": (208,), "Q4_0": (0,), "Q5_0": (0,), "Q8_0": (0,)}.get(kind, (0, 2)):
        scales = (torch.randn(*blocks.shape[:-1], 1) / 50).half()
        blocks[..., at : at + 2] = scales.view(torch.uint8)
    return blocks.flatten(-2)


@pytest.mark.parametrize("kind", SIZES)
def test_bits_are_the_gguf_package_s(kind):
    gguf = pytest.importorskip("gguf")
    blocks, number = blocks_of(kind), SIZES[kind][2]
    theirs = torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType(number)))
    assert torch.equal(check_packed(packed_of(blocks, number, torch.float32)), theirs)
    assert torch.equal(check_packed(packed_of(blocks, number, torch.bfloat16)), theirs.bfloat16())
    assert torch.equal(check_packed(packed_of(blocks[None], number, torch.float32))[0], theirs)
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(number)] == SIZES[kind][:2] and NAMES[number] == kind


def test_a_definition_of_q5_1():
    blocks = blocks_of("Q5_1")
    dense = packed_of(blocks, 7, torch.float32).dense().double()
    for row, k in ((0, 0), (3, 17), (11, 511), (5, 40)):
        block = blocks[row].reshape(-1, 24)[k // 32].tolist()
        i = k % 32
        code = block[8 + i % 16] // (16 if i >= 16 else 1) % 16 + 16 * (block[4 + i // 8] // 2 ** (i % 8) % 2)
        d, m = torch.tensor(block[:4], dtype=torch.uint8).view(torch.float16).double()
        assert abs(dense[row, k] - (d * code + m)) < 1e-6


@pytest.mark.parametrize("kind", QUANTIZED)
def test_quantize_makes_what_the_gguf_package_makes(kind):
    gguf = pytest.importorskip("gguf")
    packed = packed_of(blocks_of(kind), SIZES[kind][2], torch.float32)
    W = torch.randn(SHAPE)
    W[0, :32] = 0
    W[1, :32] = torch.tensor([1.5, -1.5]).repeat(16)
    ours = scheme("gguf").quantize(W, packed)
    theirs = gguf.quants.quantize(W.numpy(), gguf.GGMLQuantizationType(SIZES[kind][2]))
    assert torch.equal(ours["blocks"], torch.from_numpy(theirs))
    steps = {"Q4_0": 8, "Q5_0": 16, "Q4_1": 15, "Q5_1": 31, "Q8_0": 127}[kind]
    span = W.reshape(-1, 32).abs().amax(1) if kind[-1] == "0" else W.reshape(-1, 32).amax(1) - W.reshape(-1, 32).amin(1)
    error = (packed.again(ours).dense() - W).reshape(-1, 32).abs().amax(1)
    whole = 1 if kind in ("Q4_0", "Q5_0") else 0.5  # their largest code is one short of the other end
    assert (error <= span * (whole / steps + 2e-3)).all()


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K"])
def test_no_quantizer_of_the_others(kind):
    packed = packed_of(blocks_of(kind), SIZES[kind][2], torch.float32)
    with pytest.raises(StorageError, match=kind):
        scheme("gguf").quantize(torch.randn(SHAPE), packed)


def test_a_type_that_is_not_read():
    with pytest.raises(StorageError, match="type 16 .* Q4_0"):
        packed_of(torch.zeros(4, 66, dtype=torch.uint8), 16, torch.float32)


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_layers(kind, dtype):
    gguf = pytest.importorskip("transformers.integrations.gguf.utils")
    number = SIZES[kind][2]
    if number not in gguf.GGML_BLOCK:
        pytest.skip(f"transformers does not read {kind}")
    layer = gguf.GgufEmbedding(SHAPE[0], SHAPE[1], number, dtype)
    layer.weight.data = blocks_of(kind)
    dense = check_packed(recognise(layer))
    theirs = gguf.dequantize_blocks(layer.weight, number, *SHAPE, dtype)
    assert dense.dtype == dtype and torch.equal(dense, theirs)
    ids = torch.tensor([[3, 0], [11, 3]])
    assert torch.equal(twin(layer)(ids), dense[ids])


def test_a_linear_layer_of_transformers_with_permuted_inputs():
    gguf = pytest.importorskip("transformers.integrations.gguf.utils")
    layer = gguf.GgufLinear(512, 12, SIZES["Q8_0"][2], bias=True)
    layer.weight.data, layer.bias.data = blocks_of("Q8_0"), torch.randn(12)
    layer.input_permutation = torch.randperm(512)
    packed = recognise(layer)
    dense = check_packed(packed)
    x = torch.randn(40, 512)
    expected = x.double() @ dense.double().t() + layer.bias.double()
    assert torch.allclose(
        layer._unpack_matmul(x[:, layer.input_permutation]).double() + layer.bias, expected, atol=1e-4
    )
    assert torch.equal(twin(layer)(x), F.linear(x, dense, layer.bias))
    W = torch.randn(12, 512)
    new = scheme("gguf").quantize(W, packed)
    assert (packed.again(new).dense() - W).abs().max() < 0.5 * W.abs().max() / 127 * 1.01
    check_place(layer, "weight", packed, new)


def test_experts_of_transformers_are_refused():
    gguf = pytest.importorskip("transformers.integrations.gguf.utils")
    layer = gguf.GgufExperts(2, 256, 512, SIZES["Q4_K"][2], SIZES["Q6_K"][2], nn.SiLU())
    with pytest.raises(StorageError, match="load the model dequantized"):
        recognise(layer, "gate_up_proj")


@pytest.mark.parametrize("kind", SIZES)
def test_diffusers_layers(kind):
    utils = pytest.importorskip("diffusers.quantizers.gguf.utils")
    gguf = pytest.importorskip("gguf")
    layer = utils.GGUFLinear(512, 12, bias=False, compute_dtype=torch.bfloat16)
    layer.weight = utils.GGUFParameter(blocks_of(kind), quant_type=gguf.GGMLQuantizationType(SIZES[kind][2]))
    packed = recognise(layer)
    dense = check_packed(packed)
    assert torch.equal(dense, utils.dequantize_gguf_tensor(layer.weight).to(torch.bfloat16))
    if kind in QUANTIZED:
        check_place(layer, "weight", packed, scheme("gguf").quantize(torch.randn(SHAPE), packed))
