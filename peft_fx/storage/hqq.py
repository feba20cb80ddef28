"""HQQ, mobiusml.github.io/hqq_blog: layers of hqq. 8, 4, 3, 2 or 1 bits; the zero point of a group is a float.

    W = ((q - zero) * scale).reshape(out, in)

q (rows, columns) has a group in each row (axis 1) or column (axis 0); scale and zero (rows, 1) or (1, columns). In W_q the rows
lie in strips on top of one another, the first in the highest bits: of a byte, or with 3 bits of an int32, which has room for ten.
"""

from __future__ import annotations

from math import prod

import torch
from torch import nn

from ..errors import StorageError
from .base import Storage
from .bits import gather, nearest, replaced, spread
from .formats import Format
from .grids import Grid
from .packed import Packed
from .recognise import made_by


class HQQ(Storage):
    name, title = "hqq", "HQQ"

    def recognise(self, module, parameter):
        if parameter != "weight" or not made_by(module, "hqq", "HQQLinear"):
            return None
        meta = module.meta
        if meta is None:
            raise StorageError("an HQQLinear is not quantized yet: call its initialize()")
        if "scale" not in meta or "zero" not in meta:
            raise StorageError(
                "an HQQLinear with scales that are quantized or offloaded, which hqq itself writes no more: quantize the "
                "model anew with quant_zero=False, quant_scale=False and offload_meta=False"
            )
        words = module.W_q.detach()
        if meta["view_as_float"]:
            words = words.view(meta["unpack_view_dtype"])
        return Packed(hqq_format(tuple(meta["shape"]), module.compute_dtype, meta["packing"], meta["nbits"]),
                      saveable({"W_q": words, "scale": meta["scale"], "zero": meta["zero"]}))  # fmt: skip

    def dequantize(self, tensors, f):
        W_q, scale, zero = tensors
        codes = strips(W_q, f["bits"])[: prod(f.shape) // W_q.shape[1]].to(f.dtype)
        return ((codes - zero) * scale).reshape(f.shape).to(f.dtype)

    def quantize(self, W, like):
        f, own = like.format, like.tensors
        words = own["W_q"]
        codes = nearest(W.reshape(-1, words.shape[1]), own["scale"], own["zero"].float(), f["top"])
        return self.pack(codes, like)

    def grid(self, tensors, f):
        W_q, scale, zero = tensors
        rows = (prod(f.shape) // W_q.shape[1], W_q.shape[1])
        scale, offset = scale.float(), -zero.float() * scale.float()
        levels = torch.arange(f["top"] + 1, device=scale.device)
        return Grid(levels, *(t.expand(rows).reshape(f.shape) for t in (scale, offset)))

    def pack(self, codes, like):
        words = like.tensors["W_q"]
        return like.tensors | {"W_q": in_strips(codes.reshape(-1, words.shape[1]), like.format["bits"], words)}

    def fold(self, delta, like):
        own = like.tensors
        scale, zero = own["scale"].float(), own["zero"]
        mean = delta.reshape(-1, own["W_q"].shape[1]).mean(1 if zero.shape[1] == 1 else 0).view(zero.shape)
        shift = torch.where(scale == 0, 0, mean / scale)
        return own | {"zero": (zero.float() - shift).to(zero.dtype)}

    def place(self, module, parameter, new):
        numbers = new.tensors
        words = numbers["W_q"].view(module.W_q.dtype)  # it may be seen as floats
        if "W_q" in module._buffers:
            return replaced(module._buffers, numbers | {"W_q": words})
        meta = module.meta
        undo = replaced(module._parameters, {"W_q": nn.Parameter(words, requires_grad=False)})
        module.meta = meta | {"scale": numbers["scale"], "zero": numbers["zero"]}

        def back() -> None:
            undo()
            module.meta = meta

        return back


def hqq_format(shape: tuple[int, ...], dtype: torch.dtype, packing: str | None, nbits: float) -> Format:
    """packing: as hqq calls it, "4bit_u8"; None where each code has a number of its own. nbits may be 1.58: three codes."""
    bits = int(packing[0]) if packing else 8
    return Format("hqq", shape, dtype, {"bits": bits, "top": round(2**nbits - 1)})


def saveable(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors that autograd takes: those made in inference mode, as hqq makes some, are copied."""
    return {name: t.clone() if t.is_inference() else t for name, t in tensors.items()}


def strips(words: torch.Tensor, bits: int) -> torch.Tensor:
    """(rows, columns) words -> codes, the strips below one another."""
    if bits == 8:
        return words
    return spread(words, in_a_word(bits), bits).flip(-1).permute(2, 0, 1).flatten(0, 1)


def in_strips(codes: torch.Tensor, bits: int, like: torch.Tensor) -> torch.Tensor:
    """What `strips` undoes: words of the shape and type of others."""
    if bits == 8:
        return codes.to(like.dtype)
    count = in_a_word(bits)
    padded = torch.nn.functional.pad(codes.int(), (0, 0, 0, count * like.shape[0] - codes.shape[0]))
    return gather(padded.unflatten(0, (count, -1)).permute(1, 2, 0).flip(-1), bits).to(like.dtype)


def in_a_word(bits: int) -> int:
    """Strips in a word: of 3 bits ten in an int32, else as many as a byte has room for."""
    return 10 if bits == 3 else 8 // bits
