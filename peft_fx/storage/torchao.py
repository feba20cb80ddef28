"""torchao's tensor subclasses with a scale for each block: Int8Tensor, IntxUnpackedToInt8Tensor, Float8Tensor.

    W = (q - z) s       q (out, in) int8, also where fewer bits are used; s, z one for each block; in the weight's dtype
    W = q s             q float8; in float32, then rounded to the weight's dtype

Where the layer rounds its inputs too ("dynamic activation"), the product is that of `activations.py`, in training as well, as
torchao's is; it has a gradient, which torchao's has not.
"""

from __future__ import annotations

from typing import Any

import torch

from ..errors import StorageError
from .activations import product
from .affine import codes, fitted
from .blocks import ByRows, divisor, grid_of, spread
from .formats import Format
from .packed import Packed
from .placing import exchange, rebuilt
from .recognise import made_by

INT8, INTX, FLOAT8 = "Int8Tensor", "IntxUnpackedToInt8Tensor", "Float8Tensor"


class Torchao(ByRows):
    name, title, extra = "torchao", "torchao", "torchao"

    def recognise(self, module, parameter):
        held = module._parameters.get(parameter)
        if not made_by(held, "torchao", INT8, INTX, FLOAT8):
            return None
        refuse_scaled_inputs(held)
        tensors = {"qdata": held.qdata, "scale": held.scale}
        facts: dict[str, Any] = {"block": [*held.block_size]}
        if made_by(held, "torchao", FLOAT8):
            facts["float8"] = name_of(held.qdata.dtype)
        else:
            if held.zero_point is not None:
                tensors["zero_point"] = held.zero_point
            facts |= range_of(held) | {"wide": made_by(held, "torchao", INT8)}
        if (how := inputs_of(held)) is not None:
            facts["inputs"] = how
        return Packed(Format(self.name, tuple(held.shape), held.dtype, facts), tensors)

    def dequantize(self, tensors, f):
        q, scale, *zero = tensors
        block = f["block"]
        # Dense numbers are made in the weight's own dtype, but for float8.
        W = q.to(torch.float32 if "float8" in f.facts else f.dtype)
        if zero:
            W = W - spread(zero[0].to(f.dtype).reshape(scale.shape), block, f.shape)
        return (W * spread(scale, block, f.shape)).to(f.dtype)

    def rounds_inputs(self, f):
        return "inputs" in f.facts

    def linear(self, x, tensors, bias, f):
        return product(x, self.dequantize(tensors, f), bias, f["inputs"]) if self.rounds_inputs(f) else None

    def quantize(self, W, like):
        f, own = like.format, like.tensors
        block, W = f["block"], W.detach().to(f.dtype)
        if "float8" in f.facts:
            kind = own["qdata"].dtype
            largest = torch.finfo(kind).max
            scale = (grid_of(W.abs(), block, torch.amax) / largest).float()
            q = (W.float() / spread(divisor(scale), block, f.shape)).clamp(-largest, largest).to(kind)
            return {"qdata": q, "scale": scale.reshape(own["scale"].shape)}
        low, high, held = f["low"], f["high"], own.get("zero_point")
        symmetric = held is None or not held.any()
        scale, zero = fitted(W, block, low, high, symmetric=symmetric, wide=f["wide"])
        made = {
            "qdata": codes(W, scale, zero, block, low, high).to(torch.int8),
            "scale": scale.reshape(own["scale"].shape),
        }
        return made if held is None else made | {"zero_point": zero.to(held.dtype).reshape(held.shape)}

    def place(self, module, parameter, new):
        return exchange(module, {parameter: rebuilt(module._parameters[parameter], new.tensors)})


def refuse_scaled_inputs(held: torch.Tensor) -> None:
    """Raises StorageError where a layer does more to its inputs than `activations.py` can."""
    for attribute, what in (
        ("act_pre_scale", "scales its inputs by channel (SmoothQuant, AWQ)"),
        ("act_quant_scale", "rounds its inputs by a fixed scale"),
    ):
        if getattr(held, attribute, None) is not None:
            raise StorageError(
                f"a weight kept as torchao's {type(held).__name__} with {attribute}: its layer {what}, which is not read; "
                "quantize weights alone, or let torchao choose the scales of inputs as they come"
            )


def range_of(held: torch.Tensor) -> dict[str, int]:
    """The integers that are used."""
    if (target := getattr(held, "target_dtype", None)) is not None:
        bits = int(name_of(target).removeprefix("int"))
        return {"low": -(2 ** (bits - 1)), "high": 2 ** (bits - 1) - 1}
    return {"low": -64, "high": 63} if getattr(held, "reduce_range", False) else {"low": -128, "high": 127}


def inputs_of(held: torch.Tensor) -> dict[str, Any] | None:
    """How the layer rounds its inputs (`activations.rounded`); None if it does not."""
    if getattr(held, "activation_quantization", None) is not None:  # of an IntxUnpackedToInt8Tensor: there is one way
        return {"to": "int8", "rows": True, "low": -128, "high": 127, "symmetric": False, "wide": False}
    kwargs = getattr(held, "act_quant_kwargs", None)
    if kwargs is None:
        return None
    by = type(kwargs.granularity).__name__
    limited = any(getattr(kwargs, name, None) is not None for name in ("hp_value_lb", "hp_value_ub"))
    if by not in ("PerRow", "PerTensor") or limited:
        raise StorageError(
            f"a weight kept as torchao's {type(held).__name__}: its layer rounds its inputs {by}"
            f"{' within limits' * limited}, and only PerRow and PerTensor without limits are read; quantize so, or weights alone"
        )
    how: dict[str, Any] = {"rows": by == "PerRow"}
    if made_by(held, "torchao", FLOAT8):
        return how | {"to": name_of(kwargs.float8_dtype)}
    symmetric = kwargs.mapping_type.name == "SYMMETRIC"
    return how | {"to": "int8", "symmetric": symmetric, "wide": True} | range_of(kwargs)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
