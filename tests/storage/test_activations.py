"""Inputs rounded to 8 bits, by the definition in float64; scales and codes of `affine.py` with it."""

import pytest
import torch
from torch.nn import functional as F

from peft_fx.storage.activations import product, rounded

INT8 = {"to": "int8", "low": -128, "high": 127, "wide": False}


def definition(x, how):
    x = x.double()
    if how["to"] != "int8":
        kind = getattr(torch, how["to"])
        s = x.abs().max() / torch.finfo(kind).max
        return (x / s).float().to(kind).double() * s
    least, most = min(x.min(), 0), max(x.max(), 0)
    if how["symmetric"]:
        s, z = max(-least, most) / 127.5, 0
    else:
        s = (most - least) / 255
        z = (-128 - (least / s).round()).clamp(-128, 127)
    return (((x / s).round() + z).clamp(-128, 127) - z) * s


@pytest.mark.parametrize("by_row", [True, False])
@pytest.mark.parametrize("kind", ["symmetric", "asymmetric", "float8_e4m3fn", "float8_e5m2"])
def test_definition(kind, by_row):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16) * torch.tensor([0.1, 1, 10])[:, None] + 0.5
    how = {"to": kind} if "float8" in kind else INT8 | {"symmetric": kind == "symmetric"}
    how["rows"] = by_row
    expected = (
        torch.stack([definition(row, how) for row in x.flatten(0, 1)]).reshape(x.shape)
        if by_row
        else definition(x, how)
    )
    ours = rounded(x, how)
    assert torch.allclose(ours.double(), expected, rtol=1e-5) and not torch.equal(ours, x)
    W, b = torch.randn(4, 16), torch.randn(4)
    assert torch.equal(product(x, W, b, how), F.linear(ours, W, b))


def test_rows_of_zeros_stay():
    for wide in (False, True):
        assert not rounded(torch.zeros(2, 8), INT8 | {"symmetric": False, "rows": True, "wide": wide}).any()
    assert not rounded(torch.zeros(2, 8), {"to": "float8_e4m3fn", "rows": True}).any()
