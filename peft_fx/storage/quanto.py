"""optimum-quanto's weights: qint8 and qfloat8, qint4 and qint2.

    W = q s             q (out, in) int8 or float8, s for each row or one
    W = c s - t         c 0..2^bits - 1 in groups along the other axis than `axis`, one s and t for each; t is a float that is
                        already multiplied by s; or W = (c - t) s with t an integer

Codes of less than 8 bits lie in strips: of the matrix (groups, group) that is cut into 8 / bits strips of rows, byte [i, j] has
[i, j] of all strips, the first in the lowest bits. Everything is computed in the scale's dtype.
"""

from __future__ import annotations

import torch

from ..errors import StorageError
from .blocks import ByRows, divisor
from .formats import Format
from .packed import Packed
from .placing import exchange, rebuilt
from .recognise import made_by

BYTES, BITS = "WeightQBytesTensor", "WeightQBitsTensor"


class Quanto(ByRows):
    name, title, extra = "quanto", "optimum-quanto", "optimum-quanto"

    def recognise(self, module, parameter):
        held = module._parameters.get(parameter)
        if not made_by(held, "optimum", BYTES, BITS):
            return None
        kind = type(held).__name__
        if kind == "TinyGemmWeightQBitsTensor":
            return None  # in the order of torch's own product of 4 bits: `tinygemm.py`
        if kind not in (BYTES, BITS):
            raise StorageError(
                f"a weight kept as quanto's {kind} is in the order of one GPU kernel; "
                'move the model to the CPU first, model.to("cpu"), which gives it the common order'
            )
        if getattr(module, "activation_qtype", None) is not None:
            raise StorageError(
                f"a {type(module).__name__} of quanto that rounds its inputs and outputs too is not read; "
                "quantize weights alone, quantize(model, weights=...)"
            )
        shape, dtype = tuple(held.shape), held._scale.dtype
        if made_by(held, "optimum", BYTES):
            return Packed(Format(self.name, shape, dtype, {"bits": 8}), {"data": held._data, "scale": held._scale})
        packed, axis = held._data, held.axis
        facts = {"bits": packed._bits, "axis": axis, "groups": [*packed.shape]}
        tensors = {"data": packed._data, "scale": held._scale, "shift": held._shift}
        return Packed(Format(self.name, shape, dtype, facts), tensors)

    def dequantize(self, tensors, f):
        q, scale, *shift = tensors
        if f["bits"] == 8:
            return scale * q.to(f.dtype)
        bits, rows = f["bits"], f["groups"][0]
        codes = torch.cat([q >> bits * i & 2**bits - 1 for i in range(8 // bits)])[:rows]
        if shift[0].is_floating_point():
            W = scale * codes.to(f.dtype) - shift[0]
        else:
            W = scale * (codes.to(torch.int8) - shift[0].to(torch.int8)).to(f.dtype)
        return W.reshape(f.shape) if f["axis"] == 0 else from_columns(W, f)

    def quantize(self, W, like):
        f, own = like.format, like.tensors
        W = W.detach().to(f.dtype)
        if f["bits"] == 8:
            return to_bytes(W, own["data"].dtype, own["scale"])
        grouped, bits = (W.reshape(f["groups"]) if f["axis"] == 0 else to_columns(W, f)), f["bits"]
        axis = -1 if f["axis"] == 0 else 0
        if not own["shift"].is_floating_point():
            raise StorageError(
                "a weight kept by quanto with integers as zero points is not made anew: merge with storage='dense'"
            )
        least, most = grouped.amin(axis, keepdim=True), grouped.amax(axis, keepdim=True)
        scale, shift = (most - least) / (2**bits - 1), -least
        codes = ((grouped + shift) / divisor(scale)).round().clamp(0, 2**bits - 1).to(torch.uint8)
        return {"data": in_strips(codes, bits), "scale": scale, "shift": shift}

    def place(self, module, parameter, new):
        held, inner = module._parameters[parameter], {f"_{name}": tensor for name, tensor in new.tensors.items()}
        if new.format["bits"] < 8:
            inner["_data"] = rebuilt(held._data, {"_data": inner["_data"]})
        return exchange(module, {parameter: rebuilt(held, inner)})


def to_bytes(W: torch.Tensor, kind: torch.dtype, like: torch.Tensor) -> dict[str, torch.Tensor]:
    """Codes of 8 bits by the largest number of each row, or of the whole where `like` is one scale."""
    limits = torch.finfo(kind) if kind.is_floating_point else torch.iinfo(kind)
    axes = tuple(a for a in range(W.ndim) if like.ndim == 0 or like.shape[a] == 1)
    scale = W.abs().amax(axes, keepdim=True).reshape(like.shape) / limits.max
    q = W / divisor(scale)
    if not kind.is_floating_point:
        q = q.round()
    return {"data": q.clamp(limits.min, limits.max).to(kind), "scale": scale}


def in_strips(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Bytes (ceil(rows bits / 8), columns) of codes (rows, columns)."""
    strips = 8 // bits
    height = -(-codes.shape[0] // strips)
    padded = torch.nn.functional.pad(codes, (0, 0, 0, height * strips - codes.shape[0])).reshape(strips, height, -1)
    packed = padded[0]
    for i in range(1, strips):
        packed = packed | padded[i] << bits * i
    return packed


def to_columns(W: torch.Tensor, f: Format) -> torch.Tensor:
    """The groups of the last axis as columns (group, groups)."""
    group, last = f["groups"][0], f.shape[-1]
    return W.reshape(-1, group, last).permute(1, 2, 0).reshape(group, -1)


def from_columns(grouped: torch.Tensor, f: Format) -> torch.Tensor:
    group, last = f["groups"][0], f.shape[-1]
    return grouped.reshape(group, last, -1).permute(2, 0, 1).reshape(f.shape)
