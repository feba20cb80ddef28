"""bitsandbytes' 4 bits: nf4 and fp4, with scales in float32 or quantized once more. QLoRA, arXiv:2305.14314.

    W.flatten()[i] = code[q_i] * absmax[i // block]         q: two in a byte, the first in the high half
    absmax = code2[q2_j] * absmax2[j // 256] + offset       double quantization

packed (numel / 2, 1) uint8 or another type of such bytes, absmax (blocks,) float32 or uint8, code (16,), code2 (256,) float32.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from copy import copy
from math import prod
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F

from ..errors import StorageError
from .base import Storage
from .formats import Format
from .grids import Grid
from .packed import Packed
from .recognise import made_by


class BitsAndBytes4(Storage):
    name, title, extra = "bnb4", "bitsandbytes 4 bit", "bitsandbytes"

    def recognise(self, module, parameter):
        if (held := found(module, parameter)) is None:
            return None
        bytes_, state = held
        absmax, nested = state.absmax, state.nested
        if getattr(state, "packing_format_for_cpu", False):
            (bytes_, absmax), nested = unpacked(bytes_, state), False
        tensors = {"packed": bytes_, "absmax": absmax, "code": state.code}
        if nested:
            tensors |= {"absmax2": state.state2.absmax, "code2": state.state2.code, "offset": state.offset}
        facts = {
            "type": state.quant_type,
            "block": state.blocksize,
            "nested": state.state2.blocksize if nested else 0,
        }
        dtype = getattr(module, "compute_dtype", None) or state.dtype
        return Packed(Format(self.name, tuple(state.shape), dtype, facts), tensors)

    def dequantize(self, tensors, f):
        packed, _, code, *_ = tensors
        # one look-up takes a byte to its two floats
        pairs = torch.stack([code.repeat_interleave(16), code.repeat(16)], 1).view(torch.int64).reshape(-1)
        values = pairs.index_select(0, packed.reshape(-1).view(torch.uint8).int()).view(torch.float32)
        return by_block(values[: prod(f.shape)], self.scales(tensors, f), f["block"]).reshape(f.shape).to(f.dtype)

    def scales(self, tensors, f) -> torch.Tensor:
        """absmax (blocks,) float32."""
        _, absmax, _, *second = tensors
        if not second:
            return absmax.float()
        absmax2, code2, offset = second
        return by_block(code2.index_select(0, absmax.int()), absmax2, f["nested"]) + offset

    def fast(self, tensors, f):
        packed, absmax, _, *second = tensors
        if "bitsandbytes" not in sys.modules or packed.is_meta:
            return None
        ops = torch.ops.bitsandbytes
        if second:
            absmax2, code2, offset = second
            absmax = ops.dequantize_blockwise(absmax, absmax2, code2, f["nested"], torch.float32) + offset
        return ops.dequantize_4bit(packed, absmax, f["block"], f["type"], f.shape, f.dtype)

    def rows(self, tensors, ids, f):
        (count, width), (packed, absmax, code, *second) = f.shape, tensors
        if second or width % f["block"]:
            return super().rows(tensors, ids, f)
        chosen = packed.view(torch.uint8).reshape(count, -1)[ids], absmax.reshape(count, -1)[ids]
        part = Format(f.scheme, (*ids.shape, width), f.dtype, f.facts)
        return self.dense([chosen[0].reshape(-1, 1), chosen[1].reshape(-1), code], part)

    def quantize(self, W, like):
        f, own = like.format, like.tensors
        codes, absmax = nearest_codes(W.detach().float().reshape(-1), own["code"], f["block"])
        made = {"packed": bytes_like(own["packed"], codes), "absmax": absmax}
        if f["nested"]:
            offset = absmax.mean()
            q, absmax2 = scale_codes(absmax - offset, own["code2"], f["nested"])
            made |= {"absmax": q, "absmax2": absmax2, "offset": offset}
        return own | made

    def grid(self, tensors, f):
        scales = self.scales(tensors, f).repeat_interleave(f["block"])[: prod(f.shape)].reshape(f.shape)
        return Grid(tensors[2], scales, scales.new_zeros(()))

    def pack(self, codes, like):
        own = like.tensors
        return own | {"packed": bytes_like(own["packed"], codes.reshape(-1).to(torch.uint8))}

    def place(self, module, parameter, new):
        old = cast(Held, held_by(module, parameter))
        state, numbers = copy(old.state), new.tensors
        state.absmax, state.packing_format_for_cpu = numbers["absmax"], False
        if new.format["nested"]:
            state.state2, state.offset = copy(state.state2), numbers["offset"]
            state.state2.absmax = numbers["absmax2"]
        return old.replace(numbers["packed"], state)


class Held:
    """Where a layer of the package has its numbers, and how they are replaced."""

    def __init__(self, module: nn.Module, parameter: str):
        self.module, self.parameter = module, parameter

    @property
    def tensor(self) -> Any:
        return self.module._parameters[self.parameter]

    @property
    def state(self):
        return self.tensor.quant_state

    def replace(self, packed: torch.Tensor, state: Any) -> Callable[[], None]:
        module, old, before = self.module, self.tensor, self.module.__dict__.get("quant_state")
        new = type(old)(
            packed, requires_grad=False, quant_state=state, blocksize=old.blocksize, quant_type=old.quant_type,
            compress_statistics=old.compress_statistics, quant_storage=old.quant_storage, module=module, bnb_quantized=True,
        )  # fmt: skip
        self.put(new, state)
        return lambda: self.put(old, before)

    def put(self, tensor: nn.Parameter, state) -> None:
        self.module._parameters[self.parameter] = tensor
        self.module.__dict__["quant_state"] = state


class Parametrized(Held):
    """An expert stack: the package's parametrization dequantizes what lies in its list."""

    @property
    def list(self) -> Any:
        lists: Any = self.module.parametrizations
        return lists[self.parameter]

    @property
    def tensor(self):
        return self.list.original

    @property
    def state(self):
        return self.list[0].quant_state

    def replace(self, packed, state):
        old, before = self.tensor, self.state
        self.put(nn.Parameter(packed, requires_grad=False), state)
        return lambda: self.put(old, before)

    def put(self, tensor, state):
        self.list._parameters["original"], self.list[0].quant_state = tensor, state


def held_by(module: nn.Module, parameter: str) -> Held | None:
    """How the package holds a parameter; None where it does not."""
    if made_by(module._parameters.get(parameter), "bitsandbytes", "Params4bit"):
        return Held(module, parameter)
    lists: Any = getattr(module, "parametrizations", {})
    if parameter in lists and made_by(lists[parameter][0], "bitsandbytes", "Bnb4bitParametrization"):
        return Parametrized(module, parameter)
    return None


def found(module: nn.Module, parameter: str) -> tuple[torch.Tensor, Any] | None:
    """The packed bytes as a plain tensor, and the package's state for them."""
    held = held_by(module, parameter)
    if held is None:
        return None
    state = held.state if held.state is not None else getattr(module, "quant_state", None)
    if state is None:
        raise StorageError(
            f"a {type(module).__name__} is not quantized yet: bitsandbytes does so when the model is moved to a device, "
            'model.to("cpu") too'
        )
    return held.tensor.data.as_subclass(torch.Tensor), state


def unpacked(packed: torch.Tensor, state) -> tuple[torch.Tensor, torch.Tensor]:
    """(packed, absmax) as they were before an eval forward on some CPUs: absmax stays rounded to bfloat16, as it is there.

    There a block of 32 rows lies together, of each two columns the low halves of 32 bytes before the high ones; absmax is
    (in / block, out).
    """
    N, K = state.shape
    bytes_ = packed.reshape(N // 32, K // 2, 32)
    codes = torch.cat([bytes_ & 15, bytes_ >> 4], -1).reshape(N // 32, K // 2, 32, 2).permute(0, 2, 1, 3).reshape(-1, 2)
    return (codes[:, 0] << 4 | codes[:, 1]).reshape(-1, 1), state.absmax.float().t().reshape(-1)


def by_block(values: torch.Tensor, scales: torch.Tensor, block: int) -> torch.Tensor:
    """values (n,) times the scale of their block."""
    n = values.numel()
    if n % block:
        values = F.pad(values, (0, -n % block))
    return (values.reshape(-1, block) * scales[:, None]).reshape(-1)[:n]


def bytes_like(packed: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Codes (n,) uint8, two in a byte, in the type and shape of other such bytes."""
    if codes.numel() % 2:
        codes = F.pad(codes, (0, 1))
    return (codes[::2] << 4 | codes[1::2]).view(packed.dtype).reshape(packed.shape)


def scale_codes(values: torch.Tensor, code: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`nearest_codes` as the package finds them: its kernel is not exact where two are almost as near."""
    if "bitsandbytes" in sys.modules:
        return torch.ops.bitsandbytes.quantize_blockwise(values, code, block)
    return nearest_codes(values, code, block)


def nearest_codes(values: torch.Tensor, code: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(code of each of n values (n,) uint8, absmax of each block)."""
    n = values.numel()
    blocks = F.pad(values, (0, -n % block)).reshape(-1, block)
    absmax = blocks.abs().amax(1)
    scaled = (blocks * (1.0 / absmax.clamp_min(1e-38))[:, None]).clamp(-1, 1)
    ordered, order = code.sort()
    codes = order[torch.bucketize(scaled, (ordered[1:] + ordered[:-1]) / 2)]
    return codes.to(torch.uint8).reshape(-1)[:n], absmax
