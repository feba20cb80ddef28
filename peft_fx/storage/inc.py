"""Intel Neural Compressor's weights of few bits: `INCWeightOnlyLinear`, whole numbers or entries of a table of floats.

    W[n, k] = (q[n, k] - zero[n, g]) * scale[n, g]      g = g_idx[k] or k // group size; without zero points q has a sign
    W[n, k] = code[q[n, k]] * scale[n, g]               code (16,) float32

int32 words have 32 // bits codes, none in two words (of 3 bits ten). In the format called optimum they lie as GPTQ's: qweight
(in / codes, out), qzeros (groups, out / codes) with one less than the zero point, scales (groups, out); what overflows that one
is zero. Else along the inputs: qweight (out, in / codes), qzeros (out, groups / codes), scales (out, groups).
"""

from __future__ import annotations

import torch

from ..errors import StorageError
from .base import Storage
from .bits import nearest, pack_whole, replaced, unpack_whole
from .formats import Format
from .gptq import in_order
from .packed import Packed
from .recognise import made_by

NF4 = (0.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
       -0.09105003625154495, -1.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)  # fmt: skip
BNB = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
E2M1 = (0.0, 0.010416666666666666, 0.16666666666666666, 0.25, 0.3333333333333333, 0.5, 0.6666666666666666, 1.0)


def signed(halves: tuple[float, ...]) -> tuple[float, ...]:
    """The entries of 16 codes whose highest bit is the sign."""
    return (*halves, 0.0, *(-v for v in halves[1:]))


TABLES = {"nf4": NF4, "fp4": signed(BNB), "fp4_e2m1_bnb": signed(BNB), "fp4_e2m1": signed(E2M1)}


class INC(Storage):
    name, title = "inc", "Intel Neural Compressor"

    def recognise(self, module, parameter):
        if parameter != "weight" or not made_by(module, "neural_compressor", "INCWeightOnlyLinear"):
            return None
        numbers = module._buffers
        along_inputs = module.use_optimum_format or module.compression_dim == 1
        if numbers["qweight"].dtype != torch.int32 or not along_inputs:
            raise StorageError(
                f"an INCWeightOnlyLinear of {numbers['qweight'].dtype} words, compression_dim {module.compression_dim}: read "
                "are int32 words along the inputs, use_optimum_format=True or compression_dim=1"
            )
        optimum, scales = module.use_optimum_format, numbers["scales"]
        g_idx = module.g_idx
        if g_idx is None:
            g_idx = in_order(module.in_features, module.group_size, scales)
        tensors = {"qweight": numbers["qweight"], "scales": scales, "g_idx": g_idx}
        if module.dtype in TABLES:
            tensors["code"] = torch.tensor(TABLES[module.dtype], device=scales.device)
        elif "qzeros" in numbers:
            tensors["qzeros"] = numbers["qzeros"]
        facts = {"type": module.dtype if module.dtype in TABLES else "int", "bits": module.bits, "optimum": optimum}
        return Packed(Format(self.name, (module.out_features, module.in_features), scales.dtype, facts), tensors)

    def dequantize(self, tensors, f):
        codes = unpack_whole(tensors[0].t() if f["optimum"] else tensors[0], f["bits"])[:, : f.shape[1]]
        scale, zero = grid(tensors, f)
        if f["type"] != "int":
            return (tensors[3][codes] * scale).to(f.dtype)
        if zero is None:
            half = 1 << (f["bits"] - 1)
            return (((codes ^ half) - half) * scale).to(f.dtype)
        return ((codes - zero).to(torch.int8) * scale).to(f.dtype)  # 8 bits as well: there the difference may not fit

    def quantize(self, W, like):
        f, own = like.format, like.tensors
        tensors, bits = list(own.values()), f["bits"]
        made = {}
        if f["type"] != "int":
            tensors[1] = made["scales"] = table_scales(W, own)
            codes = nearest_entries(W, grid(tensors, f)[0], own["code"])
        else:
            scale, zero = grid(tensors, f)
            half = 1 << (bits - 1)
            if zero is None:
                codes = nearest(W, scale, 0, half - 1, -half).int() & (2 * half - 1)
            else:
                codes = nearest(W, scale, 0, 127, -128).int() + zero
                codes = codes & 255 if bits == 8 else codes.clamp(0, 2 * half - 1)
        words = pack_whole(codes, bits)
        return own | made | {"qweight": (words.t() if f["optimum"] else words).contiguous()}

    def place(self, module, parameter, new):
        numbers = {name: t for name, t in new.tensors.items() if name not in ("g_idx", "code")}
        undo, cached = (
            replaced(module._buffers, numbers),
            module.__dict__.pop("weight", None),
        )  # a forward keeps the dense one

        def back() -> None:
            undo()
            module.__dict__.pop("weight", None)
            if cached is not None:
                module.__dict__["weight"] = cached

        return back


def grid(tensors, f: Format) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(scale, zero or None) of each element, f.shape; zero in int32."""
    _, scales, g_idx, *more = tensors
    zeros = None
    if more and f["type"] == "int":
        zeros = unpack_whole(more[0], f["bits"])
        if f["optimum"]:
            zeros = (zeros + 1) & ((1 << f["bits"]) - 1)
            zeros = zeros[:, : f.shape[0]].t()
        zeros = zeros.index_select(1, g_idx)
    scales = scales.t() if f["optimum"] else scales
    return scales.index_select(1, g_idx), zeros


def table_scales(W: torch.Tensor, own: dict[str, torch.Tensor]) -> torch.Tensor:
    """The largest magnitude of each group over the table's largest entry, (out, groups)."""
    scales, groups = own["scales"], own["g_idx"].long().expand(W.shape[0], -1)
    largest = torch.zeros_like(scales, dtype=torch.float32)
    return (largest.scatter_reduce(1, groups, W.detach().float().abs(), "amax") / own["code"].max()).to(scales.dtype)


def nearest_entries(W: torch.Tensor, scale: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The codes of the entries that come nearest to W / scale; of two as near, the lower one."""
    values, order = table.sort(stable=True)
    scaled = W.detach().float() / torch.where(scale == 0, 1, scale.float())
    return order[torch.bucketize(scaled, (values[1:] + values[:-1]) / 2)]
