"""Int4OpaqueTensor: the order in which torch packs for CPUs, with this machine's instructions and with fewer."""

import os
import subprocess
import sys

import pytest
import torch
from packed_checks import check_packed, check_place
from torch import nn

from peft_fx.errors import StorageError
from peft_fx.storage.recognise import recognise
from peft_fx.storage.schemes import scheme
from peft_fx.storage.torchao_int4 import ROWS, packed, unpacked

pytest.importorskip("torchao")
int4 = pytest.importorskip("torchao.prototype.quantization.int4")
from torchao.prototype.quantization.int4.int4_opaque_tensor import Int4OpaqueTensor
from torchao.quantization import quantize_

from peft_fx.storage.formats import Format

SIZES = (16, 32, 48, 64, 80, 96, 128, 144)


def layer(dtype=torch.float32, out=80, group=32):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(128, out, dtype=dtype))
    quantize_(module, int4.inference_workflow.PrototypeInt4WeightOnlyConfig(group_size=group))
    return module[0]


def layout(rows, out):
    return Format("torchao_int4", (out, 64), torch.float32, {"group": 32, "rows": rows})


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
    code = f"import sys; sys.path[:0] = {sys.path!r}; from storage.test_torchao_int4 import check_order; print(check_order())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"ATEN_CPU_CAPABILITY": capability},
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) in {"avx2": (32, 0), "default": (0,)}[capability]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_is_the_layer_s(dtype):
    module = layer(dtype)
    p = recognise(module)
    dense = check_packed(p)
    x = torch.randn(5, 128, dtype=dtype)
    expected = x.double() @ dense.double().t() + module.bias.double()
    with torch.no_grad():
        assert (module(x).double() - expected).norm() < 2 * torch.finfo(dtype).eps * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantize_makes_what_the_package_makes(dtype):
    module = layer(dtype)
    p = recognise(module)
    W = torch.randn(80, 128).to(dtype)
    ours, theirs = scheme("torchao_int4").quantize(W, p), Int4OpaqueTensor.from_hp(W, [1, 32])
    for key, tensor in ours.items():
        assert torch.equal(tensor, getattr(theirs, key)), key
    error = (p.again(ours).dense() - W).reshape(80, -1, 32).abs().amax(2)
    step = ours["scale_and_zero"][..., 0].t()
    assert (error <= step * (0.5 + 20 * torch.finfo(dtype).eps)).all()
    check_place(module, "weight", p, ours)


def test_inputs_in_8_bits_are_refused():
    module = layer()
    module.weight.act_mapping_type = "symmetric"
    with pytest.raises(StorageError, match="only its kernel"):
        recognise(module)
