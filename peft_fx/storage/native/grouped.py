"""What native layers have in common whose inputs are in groups, with a scale and a zero point each."""

from __future__ import annotations

from ..gptq import in_order
from .base import NativeLinear, Sizes


class GroupedLinear(NativeLinear):
    """bits: of a code. group: inputs that share a scale, -1 for all. A g_idx that a checkpoint does not have is in order."""

    optional: tuple[str, ...] = ("g_idx",)

    def __init__(self, in_features: int, out_features: int, bias: bool, bits: int, group: int, sizes: Sizes):
        self.bits, self.group = bits, group if group > 0 else in_features
        super().__init__(in_features, out_features, bias, sizes)
        for name in self.optional:
            self._buffers[name] = self.usual(name)
        self.settle()

    def usual(self, name):
        return in_order(self.in_features, self.group, self.tensor("scales"))


def groups(in_features: int, group: int) -> int:
    """How many there are."""
    return -(-in_features // group) if group > 0 else 1
