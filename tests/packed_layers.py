"""One small packed weight of every scheme, made without its package: rounded by the scheme, or packed by hand from random codes."""

import handpacked
import torch

from peft_fx.storage import gguf, mxfp4
from peft_fx.storage.formats import Format
from peft_fx.storage.packed import Packed
from peft_fx.storage.schemes import scheme

NF4 = torch.tensor([*handpacked.FLOATS["nf4"].values()])


def like(name, shape, facts, tensors, dtype=torch.float32):
    """A function of W: W rounded by the scheme into the format of these tensors."""
    frame = Packed(Format(name, shape, dtype, facts), tensors)
    return lambda W: frame.again(scheme(name).quantize(W, frame))


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


# Of schemes that round a dense weight: (out, in) -> that function.
ROUNDED = {
    "bnb4": lambda n, k: like(
        "bnb4", (n, k), {"type": "nf4", "block": 64, "nested": 0},
        {"packed": zeros(n * k // 2, 1, dtype=torch.uint8), "absmax": zeros(n * k // 64), "code": NF4.clone()}),
    "bnb8": lambda n, k: like("bnb8", (n, k), {}, {"packed": zeros(n, k, dtype=torch.int8), "scale": zeros(n)}),
    "torchao": lambda n, k: like(
        "torchao", (n, k), {"block": [1, 32], "low": -8, "high": 7, "wide": False},
        {"qdata": zeros(n, k, dtype=torch.int8), "scale": zeros(n, k // 32), "zero_point": zeros(n, k // 32, dtype=torch.int8)}),
    "torchao_nf4": lambda n, k: like(
        "torchao_nf4", (n, k), {"block": 64, "scaler_block": n * k // 64},
        {"quantized_data": zeros(n * k // 2, dtype=torch.uint8), "quantized_scalers": zeros(n * k // 64, dtype=torch.int8),
         "quantization_factor": zeros(1), "scaler_mean": zeros(), "nf4": NF4.clone()}),
    "tinygemm": lambda n, k: like(
        "tinygemm", (n, k), {"group": 32, "rows": 0, "from_least": False},
        {"qdata": zeros(n, k // 2, dtype=torch.uint8), "scale_and_zero": zeros(k // 32, n, 2)}),
    "quanto": lambda n, k: like(
        "quanto", (n, k), {"bits": 4, "axis": 0, "groups": [n * k // 32, 32]},
        {"data": zeros(n * k // 64, 32, dtype=torch.uint8), "scale": zeros(n * k // 32, 1), "shift": zeros(n * k // 32, 1)}),
    "compressed_tensors": lambda n, k: like(
        "compressed_tensors", (n, k), {"bits": 4, "block": [1, 32], "tensors": ["packed", "scale"]},
        {"packed": zeros(n, k // 8, dtype=torch.int32), "scale": torch.full((n, k // 32), 0.04)}),
    "fp8": lambda n, k: like(
        "fp8", (n, k), {"block": [32, 32]},
        {"q": zeros(n, k).to(torch.float8_e4m3fn), "scale": zeros(n // 32, k // 32)}),
}  # fmt: skip


def packed(name, out, inp, seed=0):
    """A weight (out, in) kept by the scheme of that name; sizes are multiples of 64."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(out, inp, generator=generator) / 8
    if name in ROUNDED:
        return ROUNDED[name](out, inp)(W)
    if name == "gguf":
        blocks = gguf.QUANTIZED["Q4_0"](W.reshape(-1, 32)).reshape(out, -1)
        return gguf.packed_of(blocks, gguf.SIZES["Q4_0"][2], torch.float32)
    if name == "mxfp4":
        blocks = torch.randint(0, 256, (out, inp // 2), dtype=torch.uint8, generator=generator)
        return mxfp4.packed_of(blocks, torch.randint(121, 124, (out, inp // 32), dtype=torch.uint8, generator=generator),
                               torch.float32)  # fmt: skip
    hand = getattr(handpacked, name)(out, inp, seed=seed)
    return Packed(Format(name, tuple(hand.W.shape), hand.dtype, hand.facts), hand.tensors)
