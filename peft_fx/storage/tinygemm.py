"""4 bits in the order in which torch's CPU product of them reads (`_weight_int4pack_mm_for_cpu`): torchao's Int4OpaqueTensor,
quanto's TinyGemmWeightQBitsTensor.

    W[n, k] = (q[n, k] - 8) * scale + zero      scale_and_zero (in / group, out, 2) in the weight's dtype

In float32 and rounded once, like the product; quanto's own `dequantize` rounds more often. qdata (out, in / 2) uint8: some rows
of W are packed together, for each column a byte for two of them. With vector instructions (64 rows with AVX512, 32 with AVX2) a
byte has row i in the low half and i + rows / 2 in the high one; else (32), and in a last block with fewer rows, 2i and 2i + 1.
Which it is depends on the machine that packed, and nothing in the tensor says it: this one is taken for it.
"""

from __future__ import annotations

import torch

from ..errors import StorageError
from .base import Storage
from .blocks import divisor
from .formats import Format
from .packed import Packed
from .placing import exchange, rebuilt
from .recognise import made_by
from .torchao import refuse_scaled_inputs

ROWS = {"AVX512": 64, "AVX2": 32}  # of torch's capability: how many rows lie together in halves; any other: 0, in pairs


class TinyGemm(Storage):
    name, title, extra = "tinygemm", "4 bit for CPUs", "torchao"

    def recognise(self, module, parameter):
        held = module._parameters.get(parameter)
        if made_by(held, "torchao", "Int4OpaqueTensor"):
            refuse_scaled_inputs(held)
            if getattr(held, "act_mapping_type", None) is not None:
                raise StorageError(
                    "a weight kept as torchao's Int4OpaqueTensor for inputs in 8 bits is in an order that only its kernel "
                    "reads; quantize with PrototypeInt4WeightOnlyConfig"
                )
            qdata, params, group = held.qdata, held.scale_and_zero, held.block_size[-1]
        elif made_by(held, "optimum", "TinyGemmWeightQBitsTensor"):
            if held.device.type not in ("cpu", "meta"):
                raise StorageError(
                    f"a weight kept as quanto's TinyGemmWeightQBitsTensor on {held.device} is in the order of a GPU kernel; "
                    'move the model to the CPU first, model.to("cpu")'
                )
            qdata, params, group = held._data._data, held._scale_shift, held._group_size
        else:
            return None
        rows = ROWS.get(torch.backends.cpu.get_cpu_capability(), 0)
        facts = {"group": group, "rows": rows, "from_least": made_by(held, "optimum", "TinyGemmWeightQBitsTensor")}
        return Packed(
            Format(self.name, tuple(held.shape), held.dtype, facts), {"qdata": qdata, "scale_and_zero": params}
        )

    def dequantize(self, tensors, f):
        qdata, params = tensors
        scale, zero = (params[..., i].float().t().repeat_interleave(f["group"], 1) for i in (0, 1))
        return ((unpacked(qdata, f) - 8).float() * scale + zero).to(f.dtype)

    def quantize(self, W, like):
        f, group = like.format, like.format["group"]
        W = W.detach().to(f.dtype).reshape(f.shape[0], -1, group)
        least = W.amin(2)
        scale = (W.amax(2) - least) / 15
        if not f["from_least"]:
            scale = scale.clamp(min=1e-6)
        zero = least + scale * 8
        origin = least if f["from_least"] else zero - scale * 8  # which rounding may have moved
        codes = ((W - origin[..., None]) / divisor(scale)[..., None]).round().clamp(0, 15)
        made = {"qdata": packed(codes.to(torch.uint8).reshape(f.shape), f)}
        return made | {"scale_and_zero": torch.stack([scale, zero], -1).transpose(0, 1).contiguous()}

    def place(self, module, parameter, new):
        held, numbers = module._parameters[parameter], new.tensors
        if made_by(held, "torchao", "Int4OpaqueTensor"):
            return exchange(module, {parameter: rebuilt(held, numbers)})
        inner = {"_data": rebuilt(held._data, {"_data": numbers["qdata"]}), "_scale_shift": numbers["scale_and_zero"]}
        return exchange(module, {parameter: rebuilt(held, inner)})


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
