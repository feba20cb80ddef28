"""compressed-tensors (llm-compressor, vLLM): integers packed into words, integers and float8 as they are.

    W = (q - z) s       one s, and z where it is asymmetric, for each group of a row, each row, each block, or the whole

weight_packed (out, words) int32: codes of 1 to 8 bits, q + 2^(bits - 1), as one stream of bits along a row, the lowest first;
weight_zero_point is packed so along the rows. Else weight (out, in) int8 or float8. In the scale's dtype. weight_g_idx (in,), of
former versions: the group of each column.

The package's own layers do not run on these: it decompresses them first. Those that round their inputs do so here, too
(`activations.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from ..errors import StorageError
from .activations import product
from .blocks import ByRows, divisor, spread
from .formats import Format
from .packed import Packed
from .placing import exchange
from .recognise import made_by

FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
# tensor of ours -> the layer's
NAMES = {
    "packed": "weight_packed",
    "q": "weight",
    "scale": "weight_scale",
    "zero": "weight_zero_point",
    "group": "weight_g_idx",
}


class CompressedTensors(ByRows):
    name, title = "compressed_tensors", "compressed-tensors"

    def recognise(self, module, parameter):
        how = module.__dict__.get("quantization_scheme")
        if parameter != "weight" or not made_by(how, "compressed_tensors", "QuantizationScheme"):
            return None
        state, form = value(module.__dict__.get("quantization_status")), value(how.format)
        if state != "compressed" or how.weights is None:
            return None
        held = {
            name: tensor.data
            for name, tensor in [*module._parameters.items(), *module._buffers.items()]
            if tensor is not None
        }
        tensors = {name: held[theirs] for name, theirs in NAMES.items() if theirs in held}
        if form not in FORMATS:
            raise StorageError(
                f"a weight kept by compressed-tensors as {form!r} is not read: expected one of {', '.join(FORMATS)}; "
                "load the model with dequantize=True"
            )
        if "group" in tensors and bool((tensors["group"] < 0).any()):  # there, and not used
            del tensors["group"]
        shape = tuple(held["weight_shape"].tolist()) if "packed" in tensors else tuple(held["weight"].shape)
        facts: dict[str, Any] = {"bits": how.weights.num_bits, "block": block_of(how.weights, shape)}
        if (inputs := inputs_of(how.input_activations)) is not None:
            facts["inputs"] = inputs
        order = [name for name in NAMES if name in tensors]
        facts["tensors"] = order
        return Packed(Format(self.name, shape, tensors["scale"].dtype, facts), {name: tensors[name] for name in order})

    def dequantize(self, tensors, f):
        own, bits = dict(zip(f["tensors"], tensors, strict=True)), f["bits"]
        scale, zero = own["scale"], own.get("zero")
        q = unpacked(own["packed"], bits, f.shape[-1]) if "packed" in own else own["q"]
        if zero is not None and zero.dtype == torch.int32:
            zero = unpacked(zero.t(), bits, scale.shape[0]).t()
        W = q.to(f.dtype)
        if zero is not None:
            W = W - self.whole(zero.to(f.dtype), own, f)
        return W * self.whole(scale, own, f)

    def whole(self, grid: torch.Tensor, own: dict[str, torch.Tensor], f: Format) -> torch.Tensor:
        """The number of each element's group."""
        if "group" in own:
            return grid.index_select(1, own["group"])
        return spread(grid, f["block"], f.shape)

    def rounds_inputs(self, f):
        return "inputs" in f.facts

    def linear(self, x, tensors, bias, f):
        return product(x, self.dequantize(tensors, f), bias, f["inputs"]) if self.rounds_inputs(f) else None

    def rows(self, tensors, ids, f):
        if "group" in f["tensors"]:
            return F.embedding(ids, self.dequantize(tensors, f))
        return super().rows(tensors, ids, f)

    def quantize(self, W, like):
        f, own, bits = like.format, like.tensors, like.format["bits"]
        scale, zero = own["scale"], own.get("zero")
        if zero is not None and zero.dtype == torch.int32:
            zero = unpacked(zero.t(), bits, scale.shape[0]).t()
        scaled = W.detach().to(f.dtype) / self.whole(divisor(scale), own, f)
        if "q" in own and own["q"].is_floating_point():
            largest = torch.finfo(own["q"].dtype).max
            return own | {"q": scaled.clamp(-largest, largest).to(own["q"].dtype)}
        if zero is not None:
            scaled = scaled + self.whole(zero.to(f.dtype), own, f)
        q = scaled.round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).to(torch.int8)
        return own | ({"packed": in_words(q, bits)} if "packed" in own else {"q": q})

    def place(self, module, parameter, new):
        return exchange(module, {NAMES[name]: tensor for name, tensor in new.tensors.items()})


def value(of: object) -> object:
    """Of an enumeration, or of its value."""
    return getattr(of, "value", of)


def block_of(weights: Any, shape: tuple[int, ...]) -> list[int]:
    """The block that one scale is for."""
    strategy = value(weights.strategy)
    if strategy == "tensor":
        return [*shape]
    if strategy == "channel":
        return [*(1 for _ in shape[:-1]), shape[-1]]
    if strategy == "group":
        return [*(1 for _ in shape[:-1]), weights.group_size]
    if strategy == "block":
        return [*(1 for _ in shape[:-2]), *weights.block_structure]
    raise StorageError(
        f"a weight kept by compressed-tensors with scales by {strategy!r} is not read; load it with dequantize=True"
    )


def inputs_of(inputs: Any) -> dict[str, Any] | None:
    """How a layer rounds its inputs (`activations.rounded`); None if it does not."""
    if inputs is None:
        return None
    strategy, dynamic, bits = value(inputs.strategy), value(inputs.dynamic), inputs.num_bits
    if dynamic is not True or bits != 8 or strategy not in ("token", "tensor"):
        raise StorageError(
            f"a layer of compressed-tensors that rounds its inputs to {bits} bits by {strategy!r}"
            f"{'' if dynamic is True else ' with fixed scales'} is not read: expected 8 bits by token or tensor with scales that "
            "are chosen as inputs come; load the model with dequantize=True"
        )
    how: dict[str, Any] = {"rows": strategy == "token"}
    if value(inputs.type) == "float":
        return how | {"to": "float8_e4m3fn"}
    return how | {"to": "int8", "low": -128, "high": 127, "symmetric": inputs.symmetric, "wide": False}


def unpacked(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Words (n, w) int32 -> the first `count` codes of each row, (n, count) int8.

    Eight codes are `bits` bytes: together one whole number.
    """
    stream = words.contiguous().view(torch.uint8)
    parts = F.pad(stream, (0, -stream.shape[1] % bits)).unflatten(1, (-1, bits)).long()
    whole = parts[..., 0]
    for j in range(1, bits):
        whole = whole | parts[..., j] << 8 * j
    codes = torch.stack([whole >> bits * i & (1 << bits) - 1 for i in range(8)], -1).flatten(1)
    return (codes.narrow(1, 0, count) - (1 << bits - 1)).to(torch.int8)


def in_words(q: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `unpacked`, in as few words as hold a row."""
    words = -(-q.shape[1] * bits // 32)
    codes = F.pad(q.long() + (1 << bits - 1), (0, -q.shape[1] % 32)).unflatten(1, (-1, 8))
    whole = codes[..., 0]
    for i in range(1, 8):
        whole = whole | codes[..., i] << bits * i
    stream = torch.stack([whole >> 8 * j & 255 for j in range(bits)], -1).to(torch.uint8).flatten(1)
    return stream.contiguous().view(torch.int32).narrow(1, 0, words).contiguous()
