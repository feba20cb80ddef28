"""GPTQ, arXiv:2210.17323: layers of gptqmodel and auto-gptq. 2, 3, 4 or 8 bits, a scale and a zero point per group of inputs.

    W[n, k] = (q[n, k] - zero[g, n]) * scale[g, n]      g = g_idx[k], in any order (act-order)
    zero = the stored code, in the second version of the format; that plus one in the first, which files have

qweight (in * bits / 32, out) int32, a stream of codes down each column; qzeros (groups, out * bits / 32) int32, a stream along
each row; scales (groups, out); g_idx (in,) int32.

What a stored code of only ones plus one is, programs do not agree on. `plus` says whose rule it is:

    carry   the whole word is added to, and the next code gets what overflows: gptqmodel, which undoes its own writing so
    wrap    zero: gptqmodel's 3 bits, auto-gptq's `qlinear_cuda_old`
    whole   2 ** bits: auto-gptq's `qlinear_cuda`
    none    nothing is added: the second version
"""

from __future__ import annotations

from typing import Any

import torch

from ..errors import StorageError
from .base import Storage
from .bits import nearest, pack, replaced, unpack
from .formats import Format
from .grids import Grid
from .packed import Packed
from .recognise import made_by

NAMES = ("qweight", "qzeros", "scales", "g_idx")
# gptqmodel's kernels that keep the format, until they run; auto-gptq's files whose layers do
READABLE = ("TorchLinear", "TorchAtenLinear", "TorchFusedLinear")
OLD = {"qlinear_cuda_old": "wrap", "qlinear_cuda": "whole"}


class GPTQ(Storage):
    name, title = "gptq", "GPTQ"

    def recognise(self, module, parameter):
        if parameter != "weight":
            return None
        if made_by(module, "gptqmodel", "GPTQQuantLinear"):
            refuse_repacked(module, READABLE)
            plus = plus_one(module.bits) if module.qzero_format() == 1 else "none"
            return held(module, (module.out_features, module.in_features), plus)
        if made_by(module, "auto_gptq", "QuantLinear"):
            file = type(module).__module__.rpartition(".")[2]
            if file not in OLD:
                raise StorageError(
                    f"auto-gptq's {type(module).__module__} keeps its weight in an order of its own: load the model with "
                    "disable_exllama=True, disable_exllamav2=True and use_marlin=False"
                )
            plus = OLD[file] if module.bits != 3 else "whole"
            return held(module, (module.outfeatures, module.infeatures), plus, ordered=file == "qlinear_cuda_old")
        return None

    def dequantize(self, tensors, f):
        qweight, *_ = tensors
        scale, zero = grid(tensors, f)
        codes = unpack(qweight.t(), f["bits"])[:, : f.shape[1]]
        return ((codes.to(scale.dtype) - zero.to(scale.dtype)) * scale).to(f.dtype)

    def quantize(self, W, like):
        f, own = like.format, like.tensors
        scale, zero = grid(list(own.values()), f)
        codes = nearest(W, scale, zero, 2 ** f["bits"] - 1)
        return self.pack(codes, like)

    def grid(self, tensors, f):
        scale, zero = (t.float() for t in grid(tensors, f))
        return Grid(torch.arange(2 ** f["bits"], device=scale.device), scale, -zero * scale)

    def pack(self, codes, like):
        own = like.tensors
        return own | {"qweight": pack(codes, like.format["bits"])[:, : own["qweight"].shape[0]].t().contiguous()}

    def place(self, module, parameter, new):
        undo = replaced(module._buffers, {name: t for name, t in new.tensors.items() if name != "g_idx"})
        forget_dense(module)

        def back() -> None:
            undo()
            forget_dense(module)

        return back


def held(module: Any, shape: tuple[int, int], plus: str, *, ordered: bool = False) -> Packed:
    """What a layer of a package holds. ordered: its product takes the groups as they lie, whatever g_idx says."""
    if module.bits not in (2, 3, 4, 8):
        raise StorageError(f"a {type(module).__name__} of {module.bits} bits: GPTQ is read with 2, 3, 4 or 8 bits")
    tensors = {name: module._buffers[name] for name in NAMES}
    if ordered:
        tensors["g_idx"] = in_order(shape[1], module.group_size, tensors["scales"])
    return Packed(Format("gptq", shape, tensors["scales"].dtype, {"bits": module.bits, "plus": plus}), tensors)


def in_order(width: int, size: int, beside: torch.Tensor) -> torch.Tensor:
    """g_idx (width,) of groups of a size, one after the other, on the device of another tensor."""
    return torch.arange(width, dtype=torch.int32, device=beside.device) // size


def refuse_repacked(module: Any, readable: tuple[str, ...]) -> None:
    """Raises StorageError for a layer of gptqmodel that has put its numbers into its kernel's order."""
    kind = type(module).__name__
    words = module._buffers.get("qweight")
    if getattr(module, "linear_mode", None) == "inference" or getattr(words, "dtype", None) != torch.int32:
        raise StorageError(
            f"a {kind} has repacked its weight in a forward in evaluation mode and does not give gradients any more: load the "
            'model anew, with backend="torch" in its config, or adapt it before its first forward'
        )
    if not made_by(module, "gptqmodel", *readable):
        raise StorageError(f'a {kind} keeps its weight in its kernel\'s order: load the model with backend="torch"')


def forget_dense(module: Any) -> None:
    """Some layers of gptqmodel keep the dense weight of their last forward, where the environment asks for it."""
    if hasattr(module, "clear_weight_cache"):
        module.clear_weight_cache()


def plus_one(bits: int) -> str:
    """How gptqmodel adds one to the zero points of the first version."""
    return "wrap" if bits == 3 else "carry"


def grid(tensors, f: Format) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, zero) of each element, f.shape, in groups that may lie in any order."""
    _, qzeros, scales, g_idx = tensors
    zeros = zero_points(qzeros, f)[:, : f.shape[0]]
    return scales.t().index_select(1, g_idx), zeros.t().index_select(1, g_idx)


def zero_points(qzeros: torch.Tensor, f: Format) -> torch.Tensor:
    """(groups, out or more)."""
    bits, plus = f["bits"], f["plus"]
    if plus == "carry":
        qzeros = qzeros + sum(1 << bits * i for i in range(32 // bits))
    zeros = unpack(qzeros, bits)
    if plus == "wrap":
        return (zeros + 1) & (2**bits - 1)
    return zeros.int() + 1 if plus == "whole" else zeros
