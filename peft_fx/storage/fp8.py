"""Weights in float8 (e4m3fn, e5m2), with a scale for each block, each row, the whole, or none.

    W = q s         s float32 or a power of two (e8m0), for blocks of 128 x 128 as in DeepSeek's checkpoints, each row or all
    W = q           a layer of torch's own around a float8 parameter

As transformers' FP8Linear, FP8Embedding and FP8Experts hold them, and torch's layers. Each parameter p has its scales in
p_scale_inv (FP8Embedding: in weight_scale). Products of transformers' layers round their inputs to float8 by groups of a row;
those here take them as they are, as its backward does.
"""

from __future__ import annotations

import torch

from ..errors import StorageError
from .blocks import ByRows, grid_of, spread
from .formats import Format
from .packed import Packed
from .placing import exchange
from .recognise import made_by

KINDS = (torch.float8_e4m3fn, torch.float8_e5m2)


class Float8(ByRows):
    name, title = "fp8", "float8"

    def recognise(self, module, parameter):
        q = module._parameters.get(parameter)
        if q is None or type(q) is not torch.nn.Parameter or q.dtype not in KINDS:
            return None
        shape, scale = tuple(q.shape), None
        if made_by(module, "transformers", "FP8Linear", "FP8Embedding", "FP8Experts"):
            scale = module._parameters[scale_name(module, parameter)].data
        elif not type(module).__module__.startswith("torch.nn."):
            return None
        elif unknown := [n for n in (*module._parameters, *module._buffers) if "scale" in n]:
            raise StorageError(
                f"a {type(module).__name__} of torch's with a float8 {parameter} has {', '.join(unknown)}, which no package "
                "that is known here put there; dequantize it first"
            )
        tensors = {"q": q.data} if scale is None else {"q": q.data, "scale": scale}
        block = block_of(module, shape, scale)
        return Packed(Format(self.name, shape, dtype_of(module, scale), {"block": block}), tensors)

    def layer(self, module):
        # whose own code is that of no linear layer, and takes a dense weight
        return type(module) if made_by(module, "transformers", "FP8GroupedLinear") else None

    def dequantize(self, tensors, f):
        q, *scale = tensors
        if not scale:
            return q.to(f.dtype)
        return (q.float() * spread(scale[0].float(), f["block"], f.shape)).to(f.dtype)

    def quantize(self, W, like):
        f, own = like.format, like.tensors
        kind, W = own["q"].dtype, W.detach().float()
        largest = torch.finfo(kind).max
        if "scale" not in own:
            return {"q": W.clamp(-largest, largest).to(kind)}
        absmax, held = grid_of(W.abs(), f["block"], torch.amax), own["scale"]
        scale = torch.where(absmax > 0, 1.0 / (largest / absmax), 1.0)
        if held.dtype == torch.float8_e8m0fnu:
            scale = scale.log2().ceil().exp2()
        q = (W * spread(1.0 / scale, f["block"], f.shape)).clamp(-largest, largest).to(kind)
        return {"q": q, "scale": scale.reshape(held.shape).to(held.dtype)}

    def place(self, module, parameter, new):
        numbers = new.tensors
        put = {parameter: numbers["q"]}
        if "scale" in numbers:
            put[scale_name(module, parameter)] = numbers["scale"]
        return exchange(module, put)


def scale_name(module: torch.nn.Module, parameter: str) -> str:
    return "weight_scale" if made_by(module, "transformers", "FP8Embedding") else f"{parameter}_scale_inv"


def block_of(module: torch.nn.Module, shape: tuple[int, ...], scale: torch.Tensor | None) -> list[int]:
    """The block of one scale. Raises StorageError where the scales do not fit the weight."""
    if scale is None or scale.numel() == 1:
        return [*shape]
    given = getattr(module, "block_size", None)
    block = (
        [*(1 for _ in shape[:-2]), *given] if given else [-(-n // m) for n, m in zip(shape, scale.shape, strict=True)]
    )
    grid = [-(-n // b) for n, b in zip(shape, block, strict=True)]
    if [*scale.shape] != grid:
        raise StorageError(
            f"a {type(module).__name__} with a float8 weight {shape} in blocks of {tuple(block)} has scales "
            f"{tuple(scale.shape)}; expected {tuple(grid)}"
        )
    return block


def dtype_of(module: torch.nn.Module, scale: torch.Tensor | None) -> torch.dtype:
    """That of the bias, where it has one of more than a byte; else of the scales; else torch's default."""
    for tensor in (module._parameters.get("bias"), scale):
        if tensor is not None and tensor.dtype.itemsize > 1:
            return tensor.dtype
    return torch.get_default_dtype()
