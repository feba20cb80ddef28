"""`AQLMLinear`: checkpoints of AQLM."""

from __future__ import annotations

import torch

from ...errors import StorageError
from .base import NativeLinear


class AQLMLinear(NativeLinear):
    """bits: of a codebook's index. tile: (outputs, inputs) that an entry spans."""

    scheme = method = "aqlm"
    mark = "codes"
    packages = ("aqlm",)

    def __init__(self, in_features: int, out_features: int, bias: bool, bits: int = 16, codebooks: int = 1,
                 tile: tuple[int, int] = (1, 8)):  # fmt: skip
        if out_features % tile[0] or in_features % tile[1] or bits > 16:
            raise StorageError(
                f"an AQLM weight {(out_features, in_features)} in tiles of {tile} with indices of {bits} bits: tiles must fill "
                "it, and indices of up to 16 bits are read"
            )
        rows = out_features // tile[0]
        super().__init__(in_features, out_features, bias, {
            "codes": ((rows, in_features // tile[1], codebooks), torch.int8 if bits <= 8 else torch.int16),
            "codebooks": ((codebooks, 2**bits, *tile), torch.get_default_dtype()),
            "scales": ((rows, 1, 1, 1), torch.get_default_dtype()),
        })  # fmt: skip
        self.settle()

    @classmethod
    def skipped(cls, config):
        return [name.removesuffix(".weight") for name in config.get("linear_weights_not_to_quantize") or ()]

    @classmethod
    def like(cls, path, in_features, out_features, bias, config):
        tile = config.get("out_group_size", 1), config.get("in_group_size", 8)
        return cls(
            in_features, out_features, bias, config.get("nbits_per_codebook", 16), config.get("num_codebooks", 1), tile
        )

    def dtype(self):
        return self.codebooks.dtype
