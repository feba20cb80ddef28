"""peft_fx::product: a matrix product of float32 on the CPU through oneDNN, bias included.

    product(a, b, bias) = a b + bias        a: (m, k) contiguous, b: (k, n) or the transpose of a contiguous (n, k), bias: (n,)

torch multiplies with MKL, which keeps to AVX2 where the processor is not Intel's: on AMD's with AVX-512 oneDNN needs half the
time. It has more to do before it starts, so thin products stay where they are. No gradient: it takes the place of
products in graphs that are differentiated already.
"""

from __future__ import annotations

import functools
import platform
from pathlib import Path

import torch

WORTH = 1 << 21  # multiplications below which oneDNN's start costs more than it saves
ROWS = 8  # below these the weight is read more slowly than it is multiplied


# Not `custom_op`, whose checks for aliases take a tenth of the time of a product.
torch.library.define("peft_fx::product", "(Tensor a, Tensor b, Tensor? bias=None) -> Tensor")


def product(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(a, b.t(), bias, "none", [], "")


torch.library.impl("peft_fx::product", "cpu", product)


@torch.library.register_fake("peft_fx::product")
def _(a, b, bias=None):
    return a.new_empty(a.shape[0], b.shape[1])


def added(W: torch.Tensor, B: torch.Tensor, A: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """out = W + B A, without gradients."""
    plain = {(t.dtype, t.device.type) for t in (W, B, A)} == {(torch.float32, "cpu")}
    if plain and faster_here() and worth_it(B.shape[0], *A.shape) and B.is_contiguous() and A.is_contiguous():
        return torch.add(W, product(B, A), out=out)
    return torch.addmm(W, B, A, out=out)


@functools.cache
def faster_here() -> bool:
    """Whether this machine is one on which oneDNN multiplies faster than what torch takes."""
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return wide and torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available() and "AMD" in maker()


def maker() -> str:
    """The processor's maker, as the system says it."""
    facts = Path("/proc/cpuinfo")
    if not facts.exists():
        return platform.processor()
    return next((line for line in facts.read_text().splitlines() if line.startswith("vendor_id")), "")


def worth_it(m: int, k: int, n: int) -> bool:
    return m >= ROWS and m * k * n >= WORTH
