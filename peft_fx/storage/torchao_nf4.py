"""torchao's NF4Tensor: QLoRA's 4 bits as torchtune keeps them, with scales in 8 bits.

    W.flatten()[i] = nf4[q_i] * (s_j / factor_k + mean)     j = i // block, k = j // scaler block

quantized_data (numel / 2,) uint8, the first of two codes in the high half; quantized_scalers (blocks,) int8; quantization_factor
(scaler blocks,), scaler_mean () and nf4 (16,) in the weight's dtype, in which everything is computed.
"""

from __future__ import annotations

import torch

from .base import Storage
from .blocks import divisor
from .formats import Format
from .packed import Packed
from .placing import exchange, rebuilt
from .recognise import made_by

NAMES = ("quantized_data", "quantized_scalers", "quantization_factor", "scaler_mean", "nf4")


class TorchaoNF4(Storage):
    name, title, extra = "torchao_nf4", "torchao nf4", "torchao"

    def recognise(self, module, parameter):
        held = module._parameters.get(parameter)
        if not made_by(held, "torchao", "NF4Tensor"):
            return None
        facts = {"block": held.block_size, "scaler_block": held.scaler_block_size}
        return Packed(Format(self.name, tuple(held.shape), held.dtype, facts), {n: getattr(held, n) for n in NAMES})

    def dequantize(self, tensors, f):
        packed, scalers, factor, mean, nf4 = tensors
        codes = torch.stack([packed >> 4, packed & 15], 1).reshape(-1)
        scale = (scalers.reshape(-1, f["scaler_block"]) / factor[:, None]).reshape(-1, 1).to(f.dtype) + mean
        return (nf4.index_select(0, codes.int()).reshape(-1, f["block"]) * scale).reshape(f.shape)

    def quantize(self, W, like):
        f, nf4 = like.format, like.tensors["nf4"]
        blocks = W.detach().to(f.dtype).reshape(-1, f["block"])
        absmax = blocks.abs().amax(1)
        codes = torch.bucketize((blocks / divisor(absmax)[:, None]).float(), (nf4[1:].float() + nf4[:-1].float()) / 2)
        pairs = codes.to(torch.uint8).reshape(-1, 2)
        mean = absmax.mean()
        centred = (absmax - mean).reshape(-1, f["scaler_block"])
        factor = 256 / (2 * centred.abs().amax(1))
        scalers = (centred * factor[:, None]).round().clamp(-128, 127).to(torch.int8).reshape(-1)
        return dict(zip(NAMES, (pairs[:, 0] << 4 | pairs[:, 1], scalers, factor, mean, nf4), strict=True))

    def place(self, module, parameter, new):
        return exchange(module, {parameter: rebuilt(module._parameters[parameter], new.tensors)})
