"""AQLM, arXiv:2401.06118: layers of aqlm. A tile of the weight is a sum of entries of learnt codebooks.

    W[o, i] = scale[o] * sum_c codebooks[c][codes[o, i, c] mod entries]      tiles (out group, in group)

codes (out / out group, in / in group, codebooks) int8 or int16, two's complement; codebooks (codebooks, entries, out group, in
group); scales (out / out group, 1, 1, 1). Sums are taken in single precision and rounded to even. So does the package, but that
its sums of several bfloat16 books on CPUs, torch's embedding_bag, round the half way up.
"""

from __future__ import annotations

from typing import Any

from ..errors import StorageError
from .base import Storage
from .formats import Format
from .packed import Packed
from .recognise import made_by


class AQLM(Storage):
    name, title = "aqlm", "AQLM"

    def recognise(self, module, parameter):
        if parameter != "weight" or not made_by(module, "aqlm", "QuantizedLinear"):
            return None
        codes = module.codes.detach()
        if transposed(module):
            codes = codes.transpose(0, 1)
        f = Format(self.name, (module.out_features, module.in_features), module.codebooks.dtype)
        return Packed(f, {"codes": codes, "codebooks": module.codebooks.detach(), "scales": module.scales.detach()})

    def dequantize(self, tensors, f):
        codes, codebooks, scales = tensors
        count, entries = codebooks.shape[:2]
        rows = codes.int() & (entries - 1)
        books = codebooks.float()
        W = books[0][rows[..., 0]]
        for c in range(1, count):
            W = W + books[c][rows[..., c]]
        return (W.to(codebooks.dtype) * scales).transpose(1, 2).reshape(f.shape).to(f.dtype)

    def quantize(self, W, like):
        raise StorageError(
            "AQLM's codebooks are learnt from data, and no rounding into them is defined: merge with storage='dense'"
        )


def transposed(module: Any) -> bool:
    """Whether the package has turned the codes for its kernel on CPUs, which its first forward does to books of 256 entries."""
    rows, columns, _ = module.codes.shape
    if rows != module.out_features // module.out_group_size:
        return True
    ran = module.gemv_op is not None and module.codes.device.type == "cpu"
    return rows == columns and module.codebook_size == 256 and ran
