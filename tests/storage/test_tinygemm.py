"""4 bits in the order in which torch packs for CPUs, with this machine's instructions and with fewer: torchao's and quanto's."""

import os
import subprocess
import sys

import pytest
import torch
from packed_checks import check_packed, check_place
from torch import nn

from peft_fx.errors import StorageError
from peft_fx.storage.formats import Format
from peft_fx.storage.recognise import recognise
from peft_fx.storage.schemes import scheme
from peft_fx.storage.tinygemm import ROWS, packed, unpacked

SIZES = (16, 32, 48, 64, 80, 96, 128, 144)


def layer(maker, dtype, seed=0):
    """(layer, its weight before)."""
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(256, 80, dtype=dtype))
    W = module[0].weight.detach().clone()
    if maker == "torchao":
        torchao = pytest.importorskip("torchao.quantization")
        int4 = pytest.importorskip("torchao.prototype.quantization.int4.inference_workflow")
        torchao.quantize_(module, int4.PrototypeInt4WeightOnlyConfig(group_size=32))
    else:
        quanto = pytest.importorskip("optimum.quanto")
        quanto.quantize(module, weights=quanto.qint4)
        quanto.freeze(module)
    return module[0], W


# quanto keeps bfloat16 alone so
MADE = [("torchao", torch.float32), ("torchao", torch.bfloat16), ("quanto", torch.bfloat16)]


def layout(rows, out):
    return Format("tinygemm", (out, 64), torch.float32, {"group": 32, "rows": rows, "from_least": False})


def check_order():
    """Here and in a process of its own."""
    rows = ROWS.get(torch.backends.cpu.get_cpu_capability(), 0)
    for out in SIZES:
        codes = torch.randint(0, 16, (out, 64), dtype=torch.int32)
        theirs = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        assert torch.equal(unpacked(theirs, layout(rows, out)), codes.to(torch.int8)), (rows, out)
        assert torch.equal(packed(codes.to(torch.uint8), layout(rows, out)), theirs)
    return rows


def test_the_order_of_this_machine():
    check_order()


@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_the_order_of_lesser_machines(capability):
    code = (
        f"import sys; sys.path[:0] = {sys.path!r}; from storage.test_tinygemm import check_order; print(check_order())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"ATEN_CPU_CAPABILITY": capability},
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) in {"avx2": (32, 0), "default": (0,)}[capability]


@pytest.mark.parametrize(("maker", "dtype"), MADE)
def test_the_product_is_the_layer_s(maker, dtype):
    module, _ = layer(maker, dtype)
    p = recognise(module)
    assert p.format.scheme == "tinygemm"
    dense = check_packed(p)
    x = torch.randn(5, 256, dtype=dtype)
    expected = x.double() @ dense.double().t() + module.bias.double()
    with torch.no_grad():
        assert (module(x).double() - expected).norm() < 4 * torch.finfo(dtype).eps * expected.norm()


@pytest.mark.parametrize(("maker", "dtype"), MADE)
def test_quantize_makes_what_the_package_makes(maker, dtype):
    module, _ = layer(maker, dtype)
    p = recognise(module)
    other, W = layer(maker, dtype, seed=1)
    ours, theirs = scheme("tinygemm").quantize(W, p), recognise(other).tensors
    for key, tensor in ours.items():
        assert torch.equal(tensor, theirs[key]), key
    scale = ours["scale_and_zero"][..., 0].t()
    error = (p.again(ours).dense() - W).reshape(*scale.shape, -1).abs().amax(2)
    assert (error <= scale * (0.5 + 20 * torch.finfo(dtype).eps)).all()
    check_place(module, "weight", p, ours)


def test_inputs_in_8_bits_are_refused():
    module, _ = layer("torchao", torch.float32)
    module.weight.act_mapping_type = "symmetric"
    with pytest.raises(StorageError, match="only its kernel"):
        recognise(module)
