"""bitsandbytes' 8 bits, LLM.int8(), arXiv:2208.07339.

    W[n, k] = q[n, k] * scale[n] / 127          q (out, in) int8, scale (out,) float32

In evaluation the inputs' rows are quantized to 8 bits as well, but for columns with an element above the threshold.
"""

from __future__ import annotations

from copy import copy

import torch

from .base import Storage
from .formats import Format
from .grids import Grid
from .packed import Packed
from .recognise import made_by


class BitsAndBytes8(Storage):
    name, title, extra = "bnb8", "bitsandbytes 8 bit", "bitsandbytes"

    def recognise(self, module, parameter):
        held = module._parameters.get(parameter)
        if not made_by(held, "bitsandbytes", "Int8Params") or held.dtype != torch.int8:  # has_fp16_weights: it is dense
            return None
        state = module.__dict__.get("state")
        scale = held.SCB if getattr(held, "SCB", None) is not None else state.SCB
        f = Format(self.name, tuple(held.shape), torch.float32)
        evaluation = Format(f.scheme, f.shape, f.dtype, {"threshold": state.threshold}).text if state else ""
        return Packed(f, {"packed": held.data.as_subclass(torch.Tensor), "scale": scale}, evaluation=evaluation)

    def dequantize(self, tensors, f):
        packed, scale = tensors
        return (packed.float() * scale.mul(1.0 / 127.0)[:, None]).to(f.dtype)

    def rows(self, tensors, ids, f):
        packed, scale = tensors
        return (packed[ids].float() * (scale[ids] / 127.0)[..., None]).to(f.dtype)

    def rounds_inputs(self, f):
        return "threshold" in f.facts

    def linear(self, x, tensors, bias, f):
        if not self.rounds_inputs(f):
            return None
        packed, scale = tensors
        rows, ops = x.reshape(-1, x.shape[-1]), torch.ops.bitsandbytes
        q, row_scale, outliers = quantized_rows(rows, f["threshold"])
        if f["threshold"] > 0:
            y, _ = ops.int8_mixed_scaled_mm(rows, q, packed, row_scale, scale, outliers, bias)
        else:
            y = ops.int8_scaled_mm(q, packed, row_scale, scale, bias=bias, dtype=x.dtype)
        return y.reshape(*x.shape[:-1], packed.shape[0])

    def quantize(self, W, like):
        W = W.detach().half().float()
        scale = W.abs().amax(1)
        q = (W * (127.0 / scale.clamp_min(1e-38))[:, None]).round().to(torch.int8)
        return {"packed": q, "scale": scale}

    def grid(self, tensors, f):
        scale = tensors[1].mul(1.0 / 127.0)[:, None]
        return Grid(torch.arange(-127, 128, device=scale.device), scale, scale.new_zeros(()))

    def pack(self, codes, like):
        return like.tensors | {"packed": (codes - 127).to(torch.int8)}

    def place(self, module, parameter, new):
        old, before = module._parameters[parameter], copy(module.state)
        state, numbers = copy(module.state), new.tensors
        state.CB, state.SCB = numbers["packed"], numbers["scale"]
        module._parameters[parameter] = type(old)(numbers["packed"], requires_grad=False, CB=None, SCB=None)
        module.state = state

        def undo() -> None:
            module._parameters[parameter], module.state = old, before

        return undo


def quantized_rows(x: torch.Tensor, threshold: float):
    """(int8 rows, their scales, columns with outliers or None)."""
    return torch.ops.bitsandbytes.int8_vectorwise_quant(x.to(torch.float16), threshold)
