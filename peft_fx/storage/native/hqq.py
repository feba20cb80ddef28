"""`HQQLinear`: checkpoints of HQQ in safetensors, where each layer has its options beside its numbers, texts as bytes."""

from __future__ import annotations

from typing import Any

import torch

from ...errors import StorageError
from ..hqq import hqq_format, in_a_word
from .base import NativeLinear

PACKINGS = {8: "8bit_u8", 6: "8bit_u8", 5: "8bit_u8", 4: "4bit_u8", 3: "3bit_32", 2: "2bit_u8", 1.58: "2bit_u8",
            1: "1bit_u8"}  # fmt: skip
DTYPES = {str(dtype): dtype for dtype in (torch.float16, torch.bfloat16, torch.float32)}
FLAGS = {"view_as_float": False, "quant_scale": False, "quant_zero": False, "offload_meta": False, "encoded_state_dict": True,
         "stores_quant_config": True, "channel_wise": True, "optimize": True, "round_zero": False}  # fmt: skip
KINDS = {int: torch.int32, float: torch.float32}
TEXTS = ("packing", "unpack_view_dtype", "compute_dtype")


class HQQLinear(NativeLinear):
    """bits: of `PACKINGS`. group: numbers that share a scale, None for a whole row. axis: 1 for groups along the inputs, or 0."""

    scheme = method = "hqq"
    mark = "W_q"
    moved_by_package = True

    def __init__(
        self, in_features: int, out_features: int, bias: bool, bits: float = 4, group: int | None = 64, axis: int = 1
    ):
        self.bits, self.kept_as, self.computes_in = bits, PACKINGS[bits], torch.float16
        group = group or (in_features if axis == 1 else out_features)
        count, width = in_features * out_features // group, int(self.kept_as[0])
        rows, columns = (count, group) if axis == 1 else (group, count)
        sides = (rows, 1) if axis == 1 else (1, columns)
        super().__init__(in_features, out_features, bias, {
            "W_q": ((-(-rows // in_a_word(width)), columns), torch.int32 if width == 3 else torch.uint8),
            "scale": (sides, self.computes_in),
            "zero": (sides, self.computes_in),
        })  # fmt: skip
        words = str(self.W_q.dtype)
        texts = {"packing": self.kept_as, "unpack_view_dtype": words, "compute_dtype": str(self.computes_in)}
        sizes = {"group_size": group, "axis": axis, "nbits": bits}
        options = {name: torch.tensor(list(text.encode()), dtype=torch.uint8) for name, text in texts.items()}
        options |= {name: torch.tensor(value, dtype=KINDS[type(value)]) for name, value in sizes.items()}
        options |= {name: torch.tensor(int(value), dtype=torch.uint8) for name, value in FLAGS.items()}
        options["shape"] = torch.tensor([out_features, in_features])
        for name, value in options.items():
            self.register_buffer(name, value)
        self.settle()

    @classmethod
    def elsewhere(cls):
        return False  # transformers 5 gives the layers of such a checkpoint random weights, with the package or without

    @classmethod
    def check(cls, config):
        for options in filter(None, by_layer(config["quant_config"]).values()):
            if any(options.get(name) for name in ("scale_quant_params", "zero_quant_params", "offload_meta")):
                raise StorageError("an HQQ checkpoint of quantized or offloaded scales, which hqq itself does not read")
            bits = options["weight_quant_params"].get("nbits")
            if bits not in PACKINGS:
                raise StorageError(f"an HQQ checkpoint of nbits={bits!r}: read are {[*PACKINGS]}")

    @classmethod
    def skipped(cls, config):
        return []

    @classmethod
    def like(cls, path, in_features, out_features, bias, config):
        tag = ".".join(part for part in path.split(".") if part not in ("model", "layers") and not part.isdecimal())
        options = by_layer(config["quant_config"])
        found = options.get("") or options.get(tag)
        if not found or tag in (config.get("skip_modules") or ()):
            return None
        weight = found["weight_quant_params"]
        return cls(in_features, out_features, bias, weight["nbits"], weight["group_size"], weight["axis"])

    def loaded(self):
        packing, dtype = text_of(self.tensor("packing")), text_of(self.tensor("compute_dtype"))
        if packing not in PACKINGS.values() or dtype not in DTYPES:
            raise StorageError(
                f"an HQQ weight packed as {packing!r} for {dtype!r}: read are {sorted({*PACKINGS.values()})} for {[*DTYPES]}"
            )
        self.kept_as, self.computes_in, self.bits = packing, DTYPES[dtype], self.tensor("nbits").item()
        super().loaded()

    def numbers(self):
        words = self.tensor("W_q").view(
            torch.int32 if self.kept_as == PACKINGS[3] else torch.uint8
        )  # they may be seen as floats
        return {"W_q": words, "scale": self.tensor("scale"), "zero": self.tensor("zero")}

    def _apply(self, fn, recurse=True):
        seen = self.tensor("W_q").dtype
        self._buffers["W_q"] = self.numbers()["W_q"]  # a cast of floats would be one of bits
        super()._apply(fn, recurse)
        self._buffers["W_q"] = self.tensor("W_q").view(seen)
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for name in TEXTS:  # of any length
            if (found := state_dict.get(prefix + name)) is not None:
                self._buffers[name] = torch.empty_like(found, device=self.tensor(name).device)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def facts(self):
        return hqq_format((), self.computes_in, self.kept_as, self.bits).facts

    def dtype(self):
        return self.computes_in


def text_of(letters: torch.Tensor) -> str:
    return bytes(letters.tolist()).decode(errors="replace")


def by_layer(options: dict[str, Any]) -> dict[str, dict[str, Any] | None]:
    """Options by the tags of layers; those for all have the tag ""."""
    return {"": options} if "weight_quant_params" in options else options
