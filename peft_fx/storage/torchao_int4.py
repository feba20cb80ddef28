"""torchao's Int4OpaqueTensor: 4 bits in the order in which torch's CPU product of them reads (`_weight_int4pack_mm_for_cpu`).

    W[n, k] = (q[n, k] - 8) * scale + zero      scale_and_zero (in / group, out, 2) in the weight's dtype

qdata (out, in / 2) uint8: for each `rows` rows of W, for each column, a byte for two rows: i in the low half and i + rows / 2 in the
high one with vector instructions (64 rows with AVX512, 32 with AVX2); else (32), and in a last block with fewer rows, 2i and 2i + 1.
Which it is depends on the machine that packed, and nothing in the tensor says it: this one is taken for it.
"""

from __future__ import annotations

import torch

from ..errors import StorageError
from .base import Storage
from .formats import Format
from .packed import Packed
from .placing import exchange, rebuilt
from .recognise import made_by
from .torchao import refuse_scaled_inputs

ROWS = {"AVX512": 64, "AVX2": 32}  # of torch's capability: how many rows lie together; any other: in pairs, 0 here


class TorchaoInt4(Storage):
    name, title, extra = "torchao_int4", "torchao int4 for CPUs", "torchao"

    def recognise(self, module, parameter):
        held = module._parameters.get(parameter)
        if not made_by(held, "torchao", "Int4OpaqueTensor"):
            return None
        refuse_scaled_inputs(held)
        if getattr(held, "act_mapping_type", None) is not None:
            raise StorageError(
                "a weight kept as torchao's Int4OpaqueTensor for inputs in 8 bits is in an order that only its kernel reads; "
                "quantize with PrototypeInt4WeightOnlyConfig"
            )
        facts = {"group": held.block_size[-1], "rows": ROWS.get(torch.backends.cpu.get_cpu_capability(), 0)}
        f = Format(self.name, tuple(held.shape), held.dtype, facts)
        return Packed(f, {"qdata": held.qdata, "scale_and_zero": held.scale_and_zero})

    def dequantize(self, tensors, f):
        qdata, params = tensors
        scale, zero = (params[..., i].t().repeat_interleave(f["group"], 1) for i in (0, 1))
        return ((unpacked(qdata, f) - 8).to(f.dtype) * scale + zero).to(f.dtype)

    def quantize(self, W, like):
        f, group = like.format, like.format["group"]
        W = W.detach().to(f.dtype).reshape(f.shape[0], -1, group)
        least = W.amin(2)
        scale = ((W.amax(2) - least) / 15).clamp(min=1e-6)
        zero = least + scale * 8
        codes = ((W - (zero - scale * 8)[..., None]) / scale[..., None]).round().clamp(0, 15)
        made = {"qdata": packed(codes.to(torch.uint8).reshape(f.shape), f)}
        return made | {"scale_and_zero": torch.stack([scale, zero], -1).transpose(0, 1).contiguous()}

    def place(self, module, parameter, new):
        return exchange(module, {parameter: rebuilt(module._parameters[parameter], new.tensors)})


def parts(f: Format) -> list[tuple[int, int, bool]]:
    """(first row, rows, whether halves lie together) of what is packed as one."""
    rows, count = f["rows"], f.shape[0]
    if not rows:
        return [(n, min(32, count - n), False) for n in range(0, count, 32)]
    whole = count - count % rows
    return [(n, rows, True) for n in range(0, whole, rows)] + [(whole, count - whole, False)] * (whole < count)


def unpacked(qdata: torch.Tensor, f: Format) -> torch.Tensor:
    """Codes (out, in) int8."""
    columns, flat = f.shape[1], qdata.reshape(-1)
    found = []
    for first, rows, halves in parts(f):
        block = flat.narrow(0, first * columns // 2, rows * columns // 2).reshape(columns, rows // 2)
        both = torch.stack([block & 15, block >> 4], 1 if halves else 2)
        found.append(both.reshape(columns, rows).t())
    return torch.cat(found).to(torch.int8)


def packed(codes: torch.Tensor, f: Format) -> torch.Tensor:
    """The inverse of `unpacked`."""
    found = []
    for first, rows, halves in parts(f):
        block = codes.narrow(0, first, rows).t().reshape(-1, *((2, rows // 2) if halves else (rows // 2, 2)))
        low, high = block.unbind(1 if halves else 2)
        found.append((low | high << 4).reshape(-1))
    return torch.cat(found).reshape(codes.shape[0], -1)
