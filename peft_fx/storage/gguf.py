"""llama.cpp's GGUF: blocks of 32 or 256 weights of a row with their scales, one after the other.

    Q4_0, Q5_0, Q8_0    W = d (q - 8), d (q - 16), d q                  d float16
    Q4_1, Q5_1          W = d q + m                                     d, m float16
    Q4_K, Q5_K          W = (d s_j) q - (m t_j)                         eight parts j of 32, s and t of 6 bits
    Q6_K                W = (d s_j) (q - 32)                            sixteen parts of 16, s int8

blocks (..., out, bytes of a row) uint8. In float32 like llama.cpp itself, then rounded to the weight's dtype; transformers makes
the products with q in that dtype, diffusers everything in float16: facts "scales" and "values" say so. permutation (in,): the
columns of W, where a layer of transformers' permutes its inputs instead.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..errors import StorageError
from .blocks import ByRows
from .formats import Format
from .packed import Packed
from .placing import exchange
from .recognise import made_by

# type -> (weights, bytes) of a block, and ggml's number for it
SIZES = {
    "Q4_0": (32, 18, 2), "Q4_1": (32, 20, 3), "Q5_0": (32, 22, 6), "Q5_1": (32, 24, 7), "Q8_0": (32, 34, 8),
    "Q4_K": (256, 144, 12), "Q5_K": (256, 176, 13), "Q6_K": (256, 210, 14),
}  # fmt: skip
NAMES = {number: name for name, (_, _, number) in SIZES.items()}


class GGUF(ByRows):
    name, title, extra = "gguf", "GGUF", "gguf"

    def recognise(self, module, parameter):
        held = module._parameters.get(parameter)
        if made_by(module, "peft_fx", "GGUFLinear", "GGUFEmbedding"):
            return module.packed() if parameter == "weight" else None
        if made_by(module, "transformers", "GgufExperts") and parameter in ("gate_up_proj", "down_proj"):
            raise StorageError(
                "experts that transformers keeps in GGUF's blocks are not read: their products are those of its kernels alone; "
                "load the model dequantized"
            )
        if made_by(held, "diffusers", "GGUFParameter"):
            dtype = module.__dict__.get("compute_dtype") or torch.get_default_dtype()
            number, arithmetic = int(held.quant_type), ("float16", "float16")
        elif parameter == "weight" and made_by(module, "transformers", *LAYERS):
            dtype = dtype_of(module)
            number, arithmetic = module.ggml_type, ("float32", str(dtype).removeprefix("torch."))
        else:
            return None
        packed = packed_of(held.data.as_subclass(torch.Tensor), number, dtype, *arithmetic)
        if (order := module._buffers.get("input_permutation")) is not None:
            packed.register_buffer("permutation", order.argsort())
        return packed

    def layer(self, module):
        return next((LAYERS[c.__name__] for c in type(module).__mro__ if c.__name__ in LAYERS), None)

    def dequantize(self, tensors, f):
        blocks, *permutation = tensors
        _, size, _ = SIZES[f["type"]]
        scales, values = (getattr(torch, f[fact]) for fact in ("scales", "values"))
        W = VALUES[f["type"]](blocks.reshape(-1, size), scales, values).reshape(f.shape).to(f.dtype)
        return W.index_select(-1, permutation[0]) if permutation else W

    def rows(self, tensors, ids, f):
        if len(tensors) > 1:
            return torch.nn.functional.embedding(ids, self.dequantize(tensors, f))
        return super().rows(tensors, ids, f)

    def quantize(self, W, like):
        f, own = like.format, like.tensors
        if f["type"] not in QUANTIZED:
            raise StorageError(f"GGUF's {f['type']} is made by a search of llama.cpp's own: merge with storage='dense'")
        W = W.detach().float()
        if "permutation" in own:
            W = W.index_select(-1, own["permutation"].argsort())
        blocks = QUANTIZED[f["type"]](W.reshape(-1, SIZES[f["type"]][0]))
        return own | {"blocks": blocks.reshape(own["blocks"].shape)}

    def place(self, module, parameter, new):
        held, blocks = module._parameters.get(parameter), new.tensors["blocks"]
        if held is None:
            return exchange(module, {"blocks": blocks})
        if made_by(held, "diffusers", "GGUFParameter"):
            blocks = type(held)(blocks, quant_type=held.quant_type)
        return exchange(module, {parameter: blocks})


# transformers' layers -> torch's that do the same
LAYERS: dict[str, type[torch.nn.Module]] = {"GgufLinear": torch.nn.Linear, "GgufEmbedding": torch.nn.Embedding}


def dtype_of(module: torch.nn.Module) -> torch.dtype:
    """In which a layer computes. One of transformers' that says none does so in its inputs': its bias', or torch's default."""
    bias = module._parameters.get("bias")
    return module.__dict__.get("compute_dtype") or (torch.get_default_dtype() if bias is None else bias.dtype)


def packed_of(
    blocks: torch.Tensor, number: int, dtype: torch.dtype, scales: str = "float32", values: str = "float32"
) -> Packed:
    """Blocks (..., out, bytes of a row) of ggml's type `number`. Raises StorageError for a type that is not read."""
    if number not in NAMES:
        raise StorageError(
            f"a weight in GGUF's type {number} is not read: there are {', '.join(SIZES)}; "
            "load the model dequantized, or requantize its file with llama.cpp"
        )
    kind = NAMES[number]
    weights, size, _ = SIZES[kind]
    shape = (*blocks.shape[:-1], blocks.shape[-1] // size * weights)
    return Packed(
        Format(GGUF.name, shape, dtype, {"type": kind, "scales": scales, "values": values}), {"blocks": blocks}
    )


def half(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """(blocks, 1) float16, of two bytes."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16)


def nibbles(packed: torch.Tensor) -> torch.Tensor:
    """(n, bytes) -> (n, 2 bytes): the low halves, then the high ones."""
    return torch.cat([packed & 15, packed >> 4], 1)


def fifth_bits(packed: torch.Tensor) -> torch.Tensor:
    """(n, 4) -> (n, 32): 16 for each bit that is set, from the lowest of the first byte on."""
    return torch.stack([(packed >> i & 1) << 4 for i in range(8)], 2).reshape(-1, 32)


def thirty_twos(shift: int, minus: int, *, five: bool, offset: bool) -> Callable:
    """Of Q4_0 to Q5_1: d, m if there is one, the fifth bits if there are, nibbles."""

    def values(blocks: torch.Tensor, scales: torch.dtype, dtype: torch.dtype) -> torch.Tensor:
        q = nibbles(blocks[:, shift:])
        if five:
            q = q | fifth_bits(blocks[:, shift - 4 : shift])
        W = half(blocks, 0).to(scales).to(dtype) * (q.to(torch.int8) - minus).to(dtype)
        return W + half(blocks, 2).to(scales).to(dtype) if offset else W

    return values


def eight_bits(blocks: torch.Tensor, scales: torch.dtype, dtype: torch.dtype) -> torch.Tensor:
    return half(blocks, 0).to(scales).to(dtype) * blocks[:, 2:].contiguous().view(torch.int8).to(dtype)


def sixes(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, 12) -> s, t (n, 8) of 6 bits: four of each have them in one byte, the others the upper two in those bytes."""
    first, second, both = packed.reshape(-1, 3, 4).unbind(1)
    s = torch.cat([first & 63, both & 15 | first >> 2 & 48], 1)
    t = torch.cat([second & 63, both >> 4 | second >> 2 & 48], 1)
    return s, t


def super_blocks(*, five: bool) -> Callable:
    """Of Q4_K and Q5_K: d, m, s and t, the fifth bits if there are (bit j of 32 bytes for part j), nibbles."""

    def values(blocks: torch.Tensor, scales: torch.dtype, dtype: torch.dtype) -> torch.Tensor:
        s, t = sixes(blocks[:, 4:16])
        q = nibbles(blocks[:, 48 if five else 16 :].reshape(-1, 32)).reshape(-1, 8, 32)
        if five:
            q = q | torch.stack([(blocks[:, 16:48] >> j & 1) << 4 for j in range(8)], 1)
        d, m = half(blocks, 0).to(scales) * s.to(scales), half(blocks, 2).to(scales) * t.to(scales)
        return d.to(dtype)[..., None] * q.to(dtype) - m.to(dtype)[..., None]

    return values


def six_bits(blocks: torch.Tensor, scales: torch.dtype, dtype: torch.dtype) -> torch.Tensor:
    low = nibbles(blocks[:, :128].reshape(-1, 64)).reshape(-1, 256)
    high = torch.stack([blocks[:, 128:192].reshape(-1, 2, 32) >> 2 * j & 3 for j in range(4)], 2).reshape(-1, 256)
    q = ((low | high << 4).to(torch.int8) - 32).reshape(-1, 16, 16)
    s = blocks[:, 192:208].contiguous().view(torch.int8)
    return (half(blocks, 208).to(scales) * s.to(scales)).to(dtype)[..., None] * q.to(dtype)


VALUES: dict[str, Callable] = {
    "Q4_0": thirty_twos(2, 8, five=False, offset=False),
    "Q4_1": thirty_twos(4, 0, five=False, offset=True),
    "Q5_0": thirty_twos(6, 16, five=True, offset=False),
    "Q5_1": thirty_twos(8, 0, five=True, offset=True),
    "Q8_0": eight_bits,
    "Q4_K": super_blocks(five=False),
    "Q5_K": super_blocks(five=True),
    "Q6_K": six_bits,
}


def inverse(d: torch.Tensor) -> torch.Tensor:
    return torch.where(d == 0, 0.0, 1 / d)


def bytes_of(*halves: torch.Tensor) -> list[torch.Tensor]:
    """(n, 2) each, of float16."""
    return [h.half().view(torch.uint8) for h in halves]


def joined(q: torch.Tensor) -> torch.Tensor:
    """(n, 32) codes -> (n, 16): the inverse of `nibbles`."""
    return q[:, :16] & 15 | (q[:, 16:] & 15) << 4


def fifth(q: torch.Tensor) -> torch.Tensor:
    """(n, 32) codes -> (n, 4): the inverse of `fifth_bits`."""
    bits = (q >> 4).reshape(-1, 4, 8)
    packed = bits[..., 0]
    for i in range(1, 8):
        packed = packed | bits[..., i] << i
    return packed


def around_zero(middle: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Q4_0, Q5_0: the number that is farthest from 0 becomes -middle."""

    def quantized(W: torch.Tensor) -> torch.Tensor:
        d = W.gather(1, W.abs().argmax(1, keepdim=True)) / -middle
        q = (W * inverse(d) + (middle + 0.5)).trunc().clamp(0, 2 * middle - 1).to(torch.uint8)
        return torch.cat([*bytes_of(d), *([fifth(q)] if middle == 16 else []), joined(q)], 1)

    return quantized


def from_least(top: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Q4_1, Q5_1."""

    def quantized(W: torch.Tensor) -> torch.Tensor:
        least = W.amin(1, keepdim=True)
        d = (W.amax(1, keepdim=True) - least) / top
        q = ((W - least) * inverse(d) + 0.5).trunc().clamp(0, top).to(torch.uint8)
        return torch.cat([*bytes_of(d, least), *([fifth(q)] if top == 31 else []), joined(q)], 1)

    return quantized


def to_eight_bits(W: torch.Tensor) -> torch.Tensor:
    """Halves are rounded away from 0."""
    d = W.abs().amax(1, keepdim=True) / 127
    scaled = W * inverse(d)
    q = scaled.sign() * (scaled.abs() + 0.5).floor()
    return torch.cat([*bytes_of(d), q.to(torch.int8).view(torch.uint8)], 1)


QUANTIZED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "Q4_0": around_zero(8),
    "Q5_0": around_zero(16),
    "Q4_1": from_least(15),
    "Q5_1": from_least(31),
    "Q8_0": to_eight_bits,
}
