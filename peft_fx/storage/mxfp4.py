"""MXFP4 (OCP Microscaling): 4 bit floats (e2m1) in groups of 32 along a row, each with a power of two.

    W = code[q] 2^(s - 127)         code: 0, 0.5, 1, 1.5, 2, 3, 4, 6, then the negative ones

blocks (..., out, in / 2) uint8, the first of two in the low half; scales (..., out, in / 32) uint8, or float8_e8m0fnu with the
same bits. gpt-oss has (experts, out, groups, 16); its dense weight is (experts, in, out): the fact "transposed". Exact up to the
rounding to the weight's dtype.

As compressed-tensors keeps it in layers (mxfp4-pack-quantized), transformers' FP8Linear and FP8Experts with int8 weights, and
`packed_of` for tensors of a checkpoint.
"""

from __future__ import annotations

from typing import Any

import torch

from ..errors import StorageError
from .base import Storage
from .compressed_tensors import value
from .formats import Format
from .packed import Packed
from .placing import exchange
from .recognise import made_by

CODE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
GROUP = 32


class MXFP4(Storage):
    name, title = "mxfp4", "MXFP4"

    def recognise(self, module, parameter):
        if made_by(module, "transformers", "Mxfp4GptOssExperts") and parameter in ("gate_up_proj", "down_proj"):
            raise StorageError(
                "experts of gpt-oss that transformers has put into the order of its GPU kernel are not read; "
                "load the model with Mxfp4Config(dequantize=True)"
            )
        if (names := tensors_of(module, parameter)) is None:
            return None
        held = {**module._buffers, **module._parameters}
        blocks, scales = (held[name].data for name in names)
        if scales.dtype not in (torch.uint8, torch.float8_e8m0fnu):
            raise StorageError(
                f"4 bit floats of a {type(module).__name__} with scales in {scales.dtype} are not read: expected powers of two "
                "as bytes; dequantize the weight first"
            )
        dtype = torch.bfloat16 if "weight_packed" in held else dtype_of(module)
        return packed_of(blocks.view(torch.uint8), scales.view(torch.uint8), dtype)

    def dequantize(self, tensors, f):
        blocks, scales, code = tensors
        # one look-up takes a byte to its two floats
        pairs = torch.stack([code.repeat(16), code.repeat_interleave(16)], 1).view(torch.int64).reshape(-1)
        values = pairs.index_select(0, blocks.reshape(-1).int()).view(torch.float32).reshape(-1, GROUP)
        shape = (*f.shape[:-2], f.shape[-1], f.shape[-2]) if f["transposed"] else f.shape
        W = torch.ldexp(values, scales.reshape(-1, 1).int() - 127).reshape(shape).to(f.dtype)
        return W.transpose(-1, -2).contiguous() if f["transposed"] else W

    def rows(self, tensors, ids, f):
        if len(f.shape) != 2 or f["transposed"]:
            return super().rows(tensors, ids, f)
        chosen, (blocks, scales, code) = ids.reshape(-1), tensors
        part = Format(f.scheme, (chosen.numel(), f.shape[1]), f.dtype, f.facts)
        own = [blocks.index_select(0, chosen), scales.index_select(0, chosen), code]
        return self.dequantize(own, part).reshape(*ids.shape, f.shape[1])

    def quantize(self, W, like):
        """The power of two of a group is the least that takes its largest number to 6 at most; then to the nearest."""
        f, own = like.format, like.tensors
        W = W.detach().float()
        groups = (W.transpose(-1, -2) if f["transposed"] else W).reshape(-1, GROUP)
        largest = groups.abs().amax(1, keepdim=True) / CODE[-1]
        fraction, exponent = torch.frexp(largest)
        exponent = torch.where(fraction == 0.5, exponent - 1, exponent).clamp(-127, 127)
        scaled = torch.ldexp(groups, -exponent)
        positive = own["code"][:8]
        q = torch.bucketize(scaled.abs(), (positive[1:] + positive[:-1]) / 2) | (scaled < 0).int() << 3
        q = q.to(torch.uint8).reshape(-1, 2)
        made = {"blocks": q[:, 0] | q[:, 1] << 4, "scales": (exponent + 127).to(torch.uint8)}
        return own | {name: tensor.reshape(own[name].shape) for name, tensor in made.items()}

    def place(self, module, parameter, new):
        held = {**module._buffers, **module._parameters}
        names, own = tensors_of(module, parameter), new.tensors
        put = {
            name: own[ours].view(held[name].dtype) for name, ours in zip(names or (), ("blocks", "scales"), strict=True)
        }
        return exchange(module, put)


def tensors_of(module: torch.nn.Module, parameter: str) -> tuple[str, str] | None:
    """Where a layer has blocks and scales; None if it does not keep the parameter so."""
    how: Any = module.__dict__.get("quantization_scheme")
    held = module._parameters.get(parameter)
    if parameter == "weight" and made_by(how, "compressed_tensors", "QuantizationScheme"):
        kept = value(module.__dict__.get("quantization_status")) == "compressed"
        if not kept or value(how.format) != "mxfp4-pack-quantized":
            return None
        if how.input_activations is not None:
            raise StorageError(
                "a layer with MXFP4 weights that rounds its inputs is not read; load it with dequantize=True"
            )
        return "weight_packed", "weight_scale"
    if made_by(module, "transformers", "FP8Linear", "FP8Experts") and held is not None and held.dtype == torch.int8:
        return parameter, f"{parameter}_scale_inv"
    return None


def dtype_of(module: torch.nn.Module) -> torch.dtype:
    bias = module._parameters.get("bias")
    return torch.get_default_dtype() if bias is None else bias.dtype


def packed_of(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype, *, transposed: bool = False) -> Packed:
    """Blocks (..., out, in / 2) or (..., out, groups, 16), scales (..., out, groups), both uint8, of a weight (..., out, in).

    transposed: the dense weight is (..., in, out), as gpt-oss' experts have it. Raises StorageError for shapes that do not fit.
    """
    given = tuple(blocks.shape)
    if blocks.ndim == scales.ndim + 1:
        blocks = blocks.flatten(-2)
    *outer, out, groups = scales.shape
    if tuple(blocks.shape) != (*outer, out, groups * GROUP // 2):
        raise StorageError(
            f"MXFP4 blocks {given} do not fit scales {tuple(scales.shape)}: expected {(*outer, out, groups, GROUP // 2)}"
        )
    columns = groups * GROUP
    shape = (*outer, columns, out) if transposed else (*outer, out, columns)
    facts: dict[str, Any] = {"transposed": transposed}
    code = torch.tensor(CODE, dtype=torch.float32, device=blocks.device)
    tensors = {"blocks": blocks, "scales": scales, "code": torch.cat([code, -code])}
    return Packed(Format(MXFP4.name, shape, dtype, facts), tensors)
