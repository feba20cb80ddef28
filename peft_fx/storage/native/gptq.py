"""`GPTQLinear`: checkpoints of GPTQ, as gptqmodel, auto-gptq and optimum write them; other programs' say that they are."""

from __future__ import annotations

from typing import Any

import torch

from ...errors import StorageError
from ..gptq import plus_one
from .grouped import GroupedLinear, groups
from .inc import INCLinear

VERSIONS = {"gptq": 1, "gptq_v2": 2}
BITS = (2, 3, 4, 8)


class GPTQLinear(GroupedLinear):
    """bits: 2, 3, 4 or 8. version: of the format, which says what zero points mean."""

    scheme = method = "gptq"
    packages = ("gptqmodel", "optimum")

    def __init__(
        self, in_features: int, out_features: int, bias: bool, bits: int = 4, group: int = 128, version: int = 1
    ):
        self.version, count = version, groups(in_features, group)
        super().__init__(in_features, out_features, bias, bits, group, {
            "qweight": ((words(in_features, bits), out_features), torch.int32),
            "qzeros": ((count, words(out_features, bits)), torch.int32),
            "scales": ((count, out_features), torch.float16),
            "g_idx": ((in_features,), torch.int32),
        })  # fmt: skip

    @classmethod
    def check(cls, config):
        version = version_of(config)
        if config.get("bits") not in BITS or version not in VERSIONS:
            raise StorageError(
                f"a GPTQ checkpoint of bits={config.get('bits')!r}, format {version!r}: read are {BITS} in {[*VERSIONS]}"
            )
        if config.get("dynamic"):
            raise StorageError(
                f"a GPTQ checkpoint with rules for single layers (dynamic: {[*config['dynamic']][:3]}), which are not read: "
                "load it with gptqmodel, or quantize the model with one set of options"
            )

    @classmethod
    def skipped(cls, config):
        return config.get("modules_to_not_convert") or []

    @classmethod
    def kind(cls, stored):
        return INCLinear if any(name.endswith(".scale_bf16_to_fp8") for name in stored) else cls

    @classmethod
    def like(cls, path, in_features, out_features, bias, config):
        if not chosen(path, config):
            return None
        version = VERSIONS[version_of(config)]
        return cls(in_features, out_features, bias, config["bits"], config.get("group_size", 128), version)

    def facts(self):
        return {"bits": self.bits, "plus": plus_one(self.bits) if self.version == 1 else "none"}


def version_of(config: dict[str, Any]) -> str:
    return str(config.get("checkpoint_format") or config.get("format") or "gptq").lower()


def words(codes: int, bits: int) -> int:
    """int32 that a stream of codes fills."""
    return -(-codes * bits // 32)


def chosen(path: str, config: dict[str, Any]) -> bool:
    """Whether a GPTQ config means a linear layer: one in the model's blocks, and of these one that it names, if it names any."""
    if config.get("lm_head") and path.endswith("lm_head"):
        return True
    block = config.get("block_name_to_quantize")
    within = path.startswith(block) if block else any(part.isdecimal() for part in path.split("."))
    lists = config.get("modules_in_block_to_quantize") or ()
    return within and (not lists or any(path.endswith(name) for names in lists for name in names))
