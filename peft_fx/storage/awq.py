"""AWQ, arXiv:2306.00978: layers of gptqmodel and autoawq, in the order called GEMM. 2, 3, 4 or 8 bits.

    W[n, k] = (q[n, k] - zero[g, n]) * scale[g, n]      g = k // group size

qweight (in, out * bits / 32) int32 and qzeros (groups, out * bits / 32) int32, streams of codes along each row; scales (groups,
out). Of 4 bits, each eight codes lie in the order of the columns 0 2 4 6 1 3 5 7; other widths lie in plain order.
"""

from __future__ import annotations

from typing import Any

import torch

from ..errors import StorageError
from .base import Storage
from .bits import nearest, pack, replaced, unpack
from .formats import Format
from .gptq import refuse_repacked
from .grids import Grid
from .packed import Packed
from .recognise import made_by

# gptqmodel's kernels that keep the format, until they run; autoawq's that do not
READABLE = ("AwqTorchLinear", "TorchAtenAwqLinear", "TorchFusedAwqLinear")
OTHERS = (
    "WQLinear_GEMV",
    "WQLinear_GEMVFast",
    "WQLinear_Exllama",
    "WQLinear_ExllamaV2",
    "WQLinear_Marlin",
    "WQLinear_IPEX",
)


class AWQ(Storage):
    name, title = "awq", "AWQ"

    def recognise(self, module, parameter):
        if parameter != "weight":
            return None
        if made_by(module, "gptqmodel", "AWQuantLinear"):
            refuse_repacked(module, READABLE)
            return held(module, module.bits)
        if made_by(module, "awq", *OTHERS):
            raise StorageError(
                f"a {type(module).__name__} keeps its weight in its kernel's order: load the GEMM version"
            )
        return held(module, module.w_bit) if made_by(module, "awq", "WQLinear_GEMM") else None

    def dequantize(self, tensors, f):
        qweight, qzeros, scales = tensors
        codes = columns(qweight, f).t().contiguous()
        scale, zero = (t.t()[:, :, None] for t in (scales, columns(qzeros, f)))
        groups = codes.unflatten(1, (scales.shape[0], -1)).to(scales.dtype)
        return ((groups - zero.to(scales.dtype)) * scale).flatten(1).to(f.dtype)

    def quantize(self, W, like):
        f, own = like.format, like.tensors
        scale, zero = (t.t()[:, :, None] for t in (own["scales"], columns(own["qzeros"], f)))
        codes = nearest(W.unflatten(1, (scale.shape[1], -1)), scale, zero, 2 ** f["bits"] - 1)
        return self.pack(codes.flatten(1), like)

    def grid(self, tensors, f):
        _, qzeros, scales = tensors
        size = f.shape[1] // scales.shape[0]
        scale, zero = (t.t().float().repeat_interleave(size, 1) for t in (scales, columns(qzeros, f)))
        return Grid(torch.arange(2 ** f["bits"], device=scale.device), scale, -zero * scale)

    def pack(self, codes, like):
        own, words = like.tensors, packed_columns(codes.t(), like.format["bits"])
        return own | {"qweight": words[:, : own["qweight"].shape[1]].contiguous()}

    def place(self, module, parameter, new):
        return replaced(module._buffers, new.tensors)


def held(module: Any, bits: int) -> Packed:
    """What a layer of a package holds."""
    if bits not in (2, 3, 4, 8):
        raise StorageError(f"a {type(module).__name__} of {bits} bits: AWQ is read with 2, 3, 4 or 8 bits")
    tensors = {name: module._buffers[name] for name in ("qweight", "qzeros", "scales")}
    f = Format("awq", (module.out_features, module.in_features), tensors["scales"].dtype, {"bits": bits})
    return Packed(f, tensors)


def columns(words: torch.Tensor, f: Format) -> torch.Tensor:
    """(rows, words) -> codes (rows, out), in the order of the columns."""
    codes = unpack(words, f["bits"])
    if f["bits"] == 4:  # the even columns come first
        codes = codes.unflatten(1, (-1, 2, 4)).transpose(2, 3).flatten(1)
    return codes[:, : f.shape[0]]


def packed_columns(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """What `columns` undoes."""
    if bits == 4:
        codes = codes.unflatten(1, (-1, 4, 2)).transpose(2, 3).flatten(1)
    return pack(codes, bits)
