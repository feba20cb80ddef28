"""Intel Neural Compressor's 8-bit floats on CPUs: `PatchedLinear`, which rounds its inputs too.

W[n, k] = q[k, n] * scale                       q (in, out) float8, scale () or (1, out)
y = round(x / s) * s Wᵀ + bias                  in W's type, mostly bfloat16; s one number for all inputs
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from ..errors import StorageError
from .base import Storage
from .bits import replaced
from .formats import Format
from .packed import Packed
from .recognise import made_by


class INC8(Storage):
    name, title = "inc8", "Intel Neural Compressor's float8"

    def recognise(self, module, parameter):
        if parameter != "weight" or not made_by(module, "neural_compressor", "PatchedLinear"):
            return None
        if not module.use_qdq or not hasattr(module, "dequant_weights"):
            raise StorageError(
                "a PatchedLinear that measures, or multiplies in 8 bits: read is what convert() makes with use_qdq=True"
            )
        weight, inputs = module.dequant_weights, module.quant_input
        if not isinstance(inputs.scale, float):
            raise StorageError(
                "a PatchedLinear with several scales for its inputs: use one, scale_method='maxabs_arbitrary'"
            )
        scale = torch.as_tensor(weight.scale, dtype=torch.float32, device=module.weight.device).detach()
        facts = {"input": inputs.scale, "type": str(inputs.lp_dtype).removeprefix("torch.")}
        f = Format(self.name, tuple(module.weight.shape[::-1]), weight.hp_dtype, facts)
        return Packed(f, {"weight": module.weight.detach(), "scale": scale.reshape(1, -1) if scale.dim() else scale})

    def dequantize(self, tensors, f):
        words, scale = tensors
        return (words.float() * scale).t().contiguous().to(f.dtype)

    def rounds_inputs(self, f):
        return True

    def linear(self, x, tensors, bias, f):
        kind = getattr(torch, f["type"])
        top = torch.finfo(kind).max
        rounded = (x.float() / f["input"]).clamp(-top, top).to(kind).float() * f["input"]
        y = F.linear(rounded.to(f.dtype), self.dequantize(tensors, f))
        return (y if bias is None else y + bias).to(x.dtype)

    def quantize(self, W, like):
        words, scale = like.tensors.values()
        top = torch.finfo(words.dtype).max
        rounded = (W.detach().float().t() / scale).clamp(-top, top).to(words.dtype).contiguous()
        return like.tensors | {"weight": rounded}

    def place(self, module, parameter, new):
        weight = nn.Parameter(new.tensors["weight"], requires_grad=module.weight.requires_grad)
        return replaced(module._parameters, {"weight": weight})
