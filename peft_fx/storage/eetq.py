"""EETQ's 8 bits, github.com/NetEase-FuXi/EETQ: transformers' `EetqLinear` and the package's `W8A16Linear`.

    W[n, k] = q[k, n] * scale[n]                 scale[n] = max |W[n]| / 128

q (in, out) int8 lies as its kernel for SM 75 and later reads it: of each 16 rows in the order 0 1 8 9 2 3 10 11 4 5 12 13 6 7 14
15, transposed, two columns interleaved in tiles of 64 rows, 128 added, and of each four bytes the middle two swapped.
"""

from __future__ import annotations

import torch
from torch import nn

from ..errors import StorageError
from .base import Storage
from .bits import replaced
from .formats import Format
from .packed import Packed
from .recognise import made_by


class EETQ(Storage):
    name, title = "eetq", "EETQ"

    def recognise(self, module, parameter):
        if parameter != "weight":
            return None
        if made_by(module, "transformers", "EetqLinear"):
            return held(module.weight, module.weight_scales)
        return held(module.qweight, module.weight_scales) if made_by(module, "eetq", "W8A16Linear") else None

    def dequantize(self, tensors, f):
        words, scales = tensors
        return (in_plain_order(words).to(scales.dtype) * scales[:, None]).to(f.dtype)

    def quantize(self, W, like):
        W = W.detach().float()
        scale = W.abs().amax(1) / 128
        codes = (W / torch.where(scale == 0, 1, scale)[:, None]).round().clamp(-128, 127).to(torch.int8)
        return {"weight": in_kernel_order(codes), "weight_scales": scale.to(like.tensors["weight_scales"].dtype)}

    def place(self, module, parameter, new):
        name = "qweight" if made_by(module, "eetq", "W8A16Linear") else "weight"
        numbers = {name: new.tensors["weight"], "weight_scales": new.tensors["weight_scales"]}
        if name in module._buffers:
            return replaced(module._buffers, numbers)
        return replaced(module._parameters, {n: nn.Parameter(t, requires_grad=False) for n, t in numbers.items()})


def held(words: torch.Tensor, scales: torch.Tensor) -> Packed:
    refuse_odd(words.shape)
    f = Format("eetq", tuple(words.shape[::-1]), scales.dtype)
    return Packed(f, {"weight": words.detach(), "weight_scales": scales.detach()})


def refuse_odd(shape: torch.Size | tuple[int, ...]) -> None:
    """Raises StorageError for a shape (in, out) that the kernel's tiles do not fill."""
    if shape[0] % 64 or shape[1] % 2:
        raise StorageError(f"an EETQ weight of {shape[0]} inputs and {shape[1]} outputs: inputs go by 64, outputs by 2")


def in_plain_order(words: torch.Tensor) -> torch.Tensor:
    """(in, out) int8 as the kernel has it -> (out, in) int8."""
    width, count = words.shape
    q = (words.contiguous().view(torch.uint8) ^ 128).view(torch.int8)  # 128 less, in bytes
    q = q.reshape(-1, 2, 2).transpose(1, 2).reshape(count // 2, width // 64, 2, 64).transpose(1, 2)
    # rows 0 1 8 9 2 3 10 11 ...: pairs, of the first and of the second eight by turns
    return q.reshape(count, width // 16, 4, 2, 2).transpose(2, 3).reshape(count, width)


def in_kernel_order(codes: torch.Tensor) -> torch.Tensor:
    """What `in_plain_order` undoes: (out, in) int8 -> (in, out) int8."""
    count, width = codes.shape
    q = codes.reshape(count, width // 16, 2, 4, 2).transpose(2, 3).reshape(count // 2, 2, width // 64, 64)
    q = q.transpose(1, 2).reshape(-1, 2, 2).transpose(1, 2).contiguous()
    return (q.view(torch.uint8) ^ 128).view(torch.int8).reshape(width, count)
