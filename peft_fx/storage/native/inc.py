"""`INCLinear`: Intel Neural Compressor's checkpoints in its format "huggingface", whose config says that they are GPTQ's."""

from __future__ import annotations

import torch

from .grouped import GroupedLinear, groups


class INCLinear(GroupedLinear):
    """bits: 1 to 8, of which no code lies in two words. A bias is always there."""

    scheme = "inc"
    method = "gptq"

    def __init__(self, in_features: int, out_features: int, bias: bool = True, bits: int = 4, group: int = 128):
        count, codes = groups(in_features, group), 32 // bits
        super().__init__(in_features, out_features, True, bits, group, {
            "qweight": ((-(-in_features // codes), out_features), torch.int32),
            "scales": ((count, out_features), torch.float16),
            "g_idx": ((in_features,), torch.int32),
            "qzeros": ((count, -(-out_features // codes)), torch.int32),
        })  # fmt: skip
        self.register_buffer("scale_bf16_to_fp8", torch.zeros(1, dtype=torch.bfloat16))  # for 8-bit inputs: unused here

    @classmethod
    def skipped(cls, config):
        return []

    @classmethod
    def like(cls, path, in_features, out_features, bias, config):
        inside = any(part.isdecimal() for part in path.split("."))  # it leaves the output layer dense
        return cls(in_features, out_features, bias, config["bits"], config["group_size"]) if inside else None

    def facts(self):
        return {"type": "int", "bits": self.bits, "optimum": True}
