"""optimum-quanto's weights: codes of our own against a definition in float64, and against the package where it is installed."""

import pytest
import torch
from packed_checks import check_packed, check_place
from torch import nn
from torch.nn import functional as F

from peft_fx.errors import StorageError
from peft_fx.storage.formats import Format
from peft_fx.storage.packed import Packed
from peft_fx.storage.quanto import in_strips
from peft_fx.storage.recognise import recognise
from peft_fx.storage.schemes import scheme


def by_hand(bits, rows, columns):
    """(bytes, codes), a strip after the other."""
    torch.manual_seed(bits)
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8)
    strips = 8 // bits
    height = -(-rows // strips)
    packed = torch.zeros(height, columns, dtype=torch.uint8)
    for n in range(rows):
        packed[n % height] += codes[n] * 2 ** (bits * (n // height))
    return packed, codes


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("rows", [24, 23])
def test_strips(bits, rows):
    packed, codes = by_hand(bits, rows, 32)
    assert torch.equal(in_strips(codes, bits), packed)
    scale, shift = torch.rand(rows, 1) + 0.1, torch.randn(rows, 1)
    f = Format("quanto", (rows, 32), torch.float32, {"bits": bits, "axis": 0, "groups": [rows, 32]})
    dense = check_packed(Packed(f, {"data": packed, "scale": scale, "shift": shift}))
    assert torch.allclose(dense.double(), codes.double() * scale.double() - shift.double(), atol=1e-6)


def test_groups_of_the_last_axis_and_integer_zero_points():
    packed, codes = by_hand(4, 16, 30)  # W (32, 15): two groups of 16 in each column
    scale, shift = torch.rand(1, 30) + 0.1, torch.randint(0, 15, (1, 30), dtype=torch.uint8)
    f = Format("quanto", (32, 15), torch.float32, {"bits": 4, "axis": -1, "groups": [16, 30]})
    p = Packed(f, {"data": packed, "scale": scale, "shift": shift})
    dense = check_packed(p)
    for n, k in ((0, 0), (3, 14), (17, 2), (31, 7)):
        j = k * 2 + n // 16
        expected = (codes[n % 16, j].double() - shift[0, j].double()) * scale[0, j].double()
        assert abs(dense[n, k] - expected) < 1e-6
    with pytest.raises(StorageError, match="zero points"):
        scheme("quanto").quantize(dense, p)


def layer(kind, columns=256, dtype=torch.float32):
    from optimum import quanto

    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(columns, 48, dtype=dtype))
    quanto.quantize(module, weights=getattr(quanto, kind))
    quanto.freeze(module)
    return module[0]


KINDS = [
    ("qint8", 256),
    ("qfloat8", 256),
    ("qfloat8_e5m2", 256),
    ("qint4", 96),
    ("qint2", 256),
]  # 4 bits, groups of 128: tinygemm.py


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "columns"), KINDS)
def test_bits_are_the_package_s(kind, columns, dtype):
    pytest.importorskip("optimum.quanto")
    module = layer(kind, columns, dtype)
    dense = check_packed(recognise(module))
    assert torch.equal(dense, module.weight.dequantize())
    x = torch.randn(3, columns, dtype=dtype)
    expected = F.linear(x.double(), dense.double(), module.bias.double())
    assert (module(x).double() - expected).norm() < 2 * torch.finfo(dtype).eps * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "columns"), KINDS)
def test_quantize_makes_what_the_package_makes(kind, columns, dtype):
    quanto = pytest.importorskip("optimum.quanto")
    module = layer(kind, columns, dtype)
    packed = recognise(module)
    other = nn.Sequential(nn.Linear(columns, 48, dtype=dtype))
    W = other[0].weight.detach().clone()
    quanto.quantize(other, weights=getattr(quanto, kind))
    quanto.freeze(other)
    ours, theirs = scheme("quanto").quantize(W, packed), recognise(other[0]).tensors
    for key, tensor in ours.items():
        assert torch.equal(tensor, theirs[key]), key
    check_place(module, "weight", packed, ours)


def test_what_is_refused():
    quanto = pytest.importorskip("optimum.quanto")
    module = nn.Sequential(nn.Linear(256, 48))
    quanto.quantize(module, weights=quanto.qint8, activations=quanto.qint8)
    quanto.freeze(module)
    with pytest.raises(StorageError, match="inputs and outputs"):
        recognise(module[0])
    module = layer("qint4")
    kind = type(module.weight)
    module.weight.__class__ = type("MarlinInt4WeightQBitsTensor", (kind,), {"__module__": kind.__module__})
    with pytest.raises(StorageError, match="Marlin"):
        recognise(module)


@pytest.mark.parametrize("kind", ["qint8", "qfloat8", "qint4"])
def test_rows_of_zeros_stay(kind):
    pytest.importorskip("optimum.quanto")
    packed = recognise(layer(kind))
    W = torch.randn(packed.shape)
    W[0] = 0
    dense = packed.again(scheme("quanto").quantize(W, packed)).dense()
    assert not dense[0].any() and dense.isfinite().all()
