"""`AWQLinear`: checkpoints of AWQ in the order called GEMM, as autoawq and gptqmodel write them."""

from __future__ import annotations

import torch

from ...errors import StorageError
from .gptq import BITS, words
from .grouped import GroupedLinear, groups


class AWQLinear(GroupedLinear):
    """bits: 2, 3, 4 or 8."""

    scheme = method = "awq"
    packages = ("gptqmodel",)
    optional = ()
    output_stays = True

    def __init__(self, in_features: int, out_features: int, bias: bool, bits: int = 4, group: int = 128):
        count = groups(in_features, group)
        if in_features % count:
            raise StorageError(f"an AWQ weight of {in_features} inputs in groups of {group}: groups must fill it")
        super().__init__(in_features, out_features, bias, bits, group, {
            "qweight": ((in_features, words(out_features, bits)), torch.int32),
            "qzeros": ((count, words(out_features, bits)), torch.int32),
            "scales": ((count, out_features), torch.float16),
        })  # fmt: skip

    @classmethod
    def check(cls, config):
        order = str(config.get("version") or config.get("format") or "gemm").lower()
        if order != "gemm" or config.get("bits", 4) not in BITS:
            raise StorageError(
                f"an AWQ checkpoint of bits={config.get('bits')!r}, version {order!r}: read are {BITS} of the version 'gemm'"
            )

    @classmethod
    def kind(cls, stored):
        alone = [n for n in stored if n.endswith(".scales") and f"{n.removesuffix('scales')}qweight" not in stored]
        if alone:
            raise StorageError(
                f"an AWQ checkpoint that scales activations too ({alone[0]}), which is not read: use gptqmodel"
            )
        return cls

    @classmethod
    def like(cls, path, in_features, out_features, bias, config):
        return cls(in_features, out_features, bias, config.get("bits", 4), config.get("group_size", 128))

    def facts(self):
        return {"bits": self.bits}
