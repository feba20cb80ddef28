"""float8 weights: against transformers' own dequantizer and quantizer, and a definition in float64."""

from types import SimpleNamespace

import pytest
import torch
from packed_checks import check_packed, check_place
from torch import nn
from torch.nn import functional as F

from peft_fx.errors import StorageError
from peft_fx.storage.recognise import recognise
from peft_fx.storage.schemes import scheme
from peft_fx.storage.twins import twin

fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")


def fill(q, scale):
    q.data.copy_(torch.randn(q.shape).mul(60).to(q.dtype))
    scale.data.copy_((torch.rand(scale.shape) + 0.5) / 1000)


def linear(rows=300, columns=256, block=(128, 128), bias=True, fmt="float"):
    torch.manual_seed(0)
    with torch.device("cpu"):
        module = fp8.FP8Linear(columns, rows, block_size=block, has_bias=bias, scale_fmt=fmt)
    fill(module.weight, module.weight_scale_inv)
    if bias:
        nn.init.normal_(module.bias)
    return module.requires_grad_(False)


def float64(q, scale, block):
    W = q.double().clone()
    for n in range(W.shape[-2]):
        for k in range(W.shape[-1]):
            W[..., n, k] *= scale[..., n // block[0], k // block[1]].double()
    return W


@pytest.mark.parametrize("rows", [256, 300])  # the last block cut
@pytest.mark.parametrize("fmt", ["float", "ue8m0"])
def test_blocks(rows, fmt):
    module = linear(rows, fmt=fmt)
    packed = recognise(module)
    dense = check_packed(packed)
    assert dense.dtype == torch.float32
    assert torch.allclose(
        dense.double(), float64(module.weight, module.weight_scale_inv.float(), (128, 128)), rtol=1e-6
    )
    if rows == 256:
        theirs = fp8.Fp8Dequantize(None)._dequantize_one(module.weight, module.weight_scale_inv, torch.float32)
        assert torch.equal(dense, theirs)
    assert torch.equal(
        dense, fp8._dequantize_fp8_weight(module.weight, module.weight_scale_inv, [128, 128], torch.float32)
    )


def test_one_scale_and_the_dtype_of_the_bias():
    module = linear(block=None)
    module.bias.data = module.bias.data.bfloat16()
    dense = check_packed(recognise(module))
    assert dense.dtype == torch.bfloat16
    assert torch.equal(dense, (module.weight.float() * module.weight_scale_inv).bfloat16())


def test_an_embedding_gathers_rows():
    torch.manual_seed(0)
    module = fp8.FP8Embedding(40, 16).requires_grad_(False)
    fill(module.weight, module.weight_scale)
    dense = check_packed(recognise(module))
    ids = torch.tensor([3, 39, 0])
    assert torch.equal(module(ids), dense[ids])


def test_groups_of_a_linear_layer_run_its_own_code():
    torch.manual_seed(0)
    module = fp8.FP8GroupedLinear(128, 256, 2, block_size=(128, 128)).requires_grad_(False)
    fill(module.weight, module.weight_scale_inv)
    W = recognise(module).dense()
    x = torch.randn(3, 2, 128)
    assert torch.allclose(
        twin(module)(x), torch.stack([x[:, i] @ W[128 * i : 128 * i + 128].t() for i in (0, 1)], 1), atol=1e-5
    )


def test_experts():
    torch.manual_seed(0)
    config = SimpleNamespace(hidden_size=128, num_local_experts=3, moe_intermediate_size=128, hidden_act="silu")
    module = fp8.FP8Experts(config, block_size=(128, 128)).requires_grad_(False)
    for name in ("gate_up_proj", "down_proj"):
        fill(module._parameters[name], module._parameters[f"{name}_scale_inv"])
        packed = recognise(module, name)
        dense = check_packed(packed)
        scale = module._parameters[f"{name}_scale_inv"]
        assert torch.allclose(dense.double(), float64(module._parameters[name], scale, (128, 128)), rtol=1e-6)
        check_place(module, name, packed, scheme("fp8").quantize(torch.randn(dense.shape), packed))
    hidden, chosen, shares = (
        torch.randn(5, 128),
        torch.tensor([[0, 1], [2, 0], [1, 1], [2, 1], [0, 2]]),
        torch.rand(5, 2),
    )
    up, down = (recognise(module, n).dense() for n in ("gate_up_proj", "down_proj"))

    def expert(e, x):
        gate, value = (up[e] @ x).chunk(2)
        return down[e] @ (F.silu(gate) * value)

    rows = zip(hidden, chosen.tolist(), shares, strict=True)
    expected = torch.stack([sum(s * expert(e, x) for e, s in zip(es, ss, strict=True)) for x, es, ss in rows])
    assert torch.allclose(twin(module)(hidden, chosen, shares), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("layer", [nn.Linear(32, 24), nn.Embedding(24, 32)])
def test_torch_s_own_layers(layer, kind):
    layer.weight = nn.Parameter(torch.randn(24, 32).to(kind), requires_grad=False)
    packed = recognise(layer)
    assert torch.equal(check_packed(packed), layer.weight.float())
    W = torch.randn(24, 32) * 3
    ours = scheme("fp8").quantize(W, packed)
    assert torch.equal(ours["q"], W.to(kind))
    check_place(layer, "weight", packed, ours)


@pytest.mark.parametrize("fmt", ["float", "ue8m0"])
def test_quantize_makes_what_transformers_makes(fmt):
    module = linear(256, fmt=fmt)
    packed = recognise(module)
    W = torch.randn(256, 256)
    W[:128, :128] = 0
    config = SimpleNamespace(weight_block_size=(128, 128), scale_fmt=fmt)
    theirs = fp8.Fp8Quantize(SimpleNamespace(quantization_config=config))._quantize_one("a.weight", W)
    ours = scheme("fp8").quantize(W, packed)
    assert torch.equal(ours["scale"].float(), theirs["a.weight_scale_inv"].float())
    assert torch.equal(ours["q"].float(), theirs["a.weight"].float())
    error = (packed.again(ours).dense() - W).abs()
    assert (
        error <= W.abs() / 16 * 1.0001 + W.abs().max() / 448 / 2**9
    ).all()  # half a step of 3 bits, or of the subnormals
    check_place(module, "weight", packed, ours)


def test_scales_that_do_not_fit_are_refused():
    module = linear()
    module.weight_scale_inv.data = torch.ones(2, 2)
    with pytest.raises(StorageError, match=r"expected \(3, 2\)"):
        recognise(module)
    assert recognise(nn.Linear(4, 4)) is None
