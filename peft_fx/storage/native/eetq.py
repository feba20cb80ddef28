"""`EETQLinear`: checkpoints of EETQ, as transformers writes them on a GPU."""

from __future__ import annotations

import torch

from ..eetq import refuse_odd
from .base import NativeLinear


class EETQLinear(NativeLinear):
    """weight is int8 (in, out) in the kernel's order; it stands for the dense weight, which is (out, in)."""

    scheme = method = "eetq"
    mark = "weight_scales"
    packages = ("kernels",)

    def __init__(self, in_features: int, out_features: int, bias: bool):
        refuse_odd((in_features, out_features))
        super().__init__(in_features, out_features, bias, {
            "weight": ((in_features, out_features), torch.int8),
            "weight_scales": ((out_features,), torch.float16),
        })  # fmt: skip
        self.settle()

    @classmethod
    def elsewhere(cls):
        return torch.cuda.is_available() and super().elsewhere()

    @classmethod
    def like(cls, path, in_features, out_features, bias, config):
        return cls(in_features, out_features, bias)

    def dtype(self):
        return self.weight_scales.dtype
