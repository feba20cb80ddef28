"""`native_layers`: transformers' `from_pretrained` with the layers of this package in the place of those of others.

Within it, the entries of transformers' tables of quantizers and of their configs are others; nothing else of it is touched.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from ...errors import StorageError
from ..bits import replaced
from .base import NativeLinear
from .layers import LAYERS, layer


@contextmanager
def native_layers(*, always: bool = False) -> Iterator[None]:
    """Within it `from_pretrained` reads quantized checkpoints without the packages that wrote them.

        with peft_fx.native_layers():
            model = AutoModelForCausalLM.from_pretrained(path)

    For the methods whose packages are missing here; always: for all that there are layers for. Loaded are what is quantized
    already: nothing is quantized. Raises StorageError, from within `from_pretrained`, for checkpoints that cannot be read.
    """
    from transformers.quantizers import auto

    chosen = [method for method in LAYERS if always or not layer(method).elsewhere()]
    configs, quantizers = auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING
    undo = [
        replaced(configs, {method: config_class(configs[method], layer(method)) for method in chosen}),
        replaced(quantizers, {method: quantizer_class(layer(method)) for method in chosen}),
    ]
    try:
        yield
    finally:
        for back in undo:
            back()


def config_class(original: type, chosen: type[NativeLinear]) -> type:
    """A config that is a checkpoint's own dictionary: transformers' may import a package, drop fields, or write others."""
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class NativeConfig(QuantizationConfigMixin):
        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> NativeConfig:  # type: ignore[override]
            chosen.check(config_dict)
            config = cls(config_dict["quant_method"])
            vars(config).update(copy.deepcopy(config_dict))
            return config

    NativeConfig.__name__ = original.__name__  # by which transformers compares it with one that the user passes
    return NativeConfig


def quantizer_class(chosen: type[NativeLinear]) -> type:
    """transformers' hooks into `from_pretrained`: layers are built before the weights are read, and checked after."""
    from transformers.quantizers.base import HfQuantizer

    class NativeQuantizer(HfQuantizer):
        requires_calibration = True  # only what is quantized already is loaded
        is_trainable = True
        built: dict[str, NativeLinear]

        def is_serializable(self) -> bool:
            return True

        def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> None:
            config, names = self.quantization_config.to_dict(), stored(checkpoint_files or ())
            kind = chosen.kind(names)
            dense = self.get_modules_to_not_convert(
                model, kind.skipped(config), model._keep_in_fp32_modules, add_default_skips=kind.output_stays
            )
            self.built = build(model, kind, config, dense, names)
            refuse_leftovers(names, self.built, kind)

        def get_new_dtype(self, converter: Any, param: Any, dtype: Any) -> Any:
            """The file's own type for what is packed: a state dict has it again."""
            packed = module_of(converter.target_patterns[0]) in self.built
            return None if packed else super().get_new_dtype(converter, param, dtype)

        def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
            """No more hangs on it here than who refuses a wrong shape: `finish` does."""
            return module_of(param_name) in self.built

        def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
            finish(self.built)
            if chosen.moved_by_package:
                del model.quantization_method
            return model

    return NativeQuantizer


def module_of(name: str) -> str:
    return name.rpartition(".")[0]


def stored(files: Iterable[str]) -> set[str]:
    """Names of the tensors in safetensors files; of others none are known."""
    names: set[str] = set()
    for path in files:
        if str(path).endswith(".safetensors"):
            with safe_open(path, framework="pt") as file:
                names.update(file.keys())
    return names


def build(model: nn.Module, kind: type[NativeLinear], config: dict[str, Any], dense: list[str],
          names: set[str]) -> dict[str, NativeLinear]:  # fmt: skip
    """Puts layers into a model that has no numbers yet; returns them by path."""
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.quantizers_utils import should_convert_module

    built = {}
    for path, module in list(model.named_modules()):
        turned = isinstance(module, Conv1D)
        if not (turned or type(module) is nn.Linear) or not should_convert_module(path, dense):
            continue
        height, width = module.weight.shape
        with torch.device("meta"):
            new = kind.like(path, *((height, width) if turned else (width, height)), module.bias is not None, config)
        if new is not None:
            for name in kind.optional:
                if names and not any(n.endswith(f".{name}") for n in names):
                    new.leave_out(name)
            model.set_submodule(path, new)
            built[path] = new
    return built


def refuse_leftovers(names: set[str], built: dict[str, NativeLinear], kind: type[NativeLinear]) -> None:
    """Raises StorageError for a checkpoint with more packed weights than the model has places for, which would get lost."""
    packed = sorted(name for name in names if name.endswith(f".{kind.mark}"))
    if len(packed) > len(built):
        left = [name for name in packed if module_of(name) not in built] or packed
        raise StorageError(
            f"the checkpoint has {len(packed)} packed weights and the model {len(built)} linear layers for them by the config: "
            f"there is no place for {', '.join(left[:3])}. Experts that transformers stacks have none"
        )


def finish(built: dict[str, NativeLinear]) -> None:
    """Takes the layers into use. Raises one StorageError for all tensors that are missing or do not fit."""
    wrong = []
    for path, module in built.items():
        missing = [
            name for name, t in module.state_dict(keep_vars=True).items() if not hasattr(t, "_is_hf_initialized")
        ]
        if missing:
            wrong.append(f"{path} has no {', '.join(missing)}")
            continue
        try:
            module.loaded()
        except StorageError as error:
            wrong.append(f"{path}: {error}")
    if wrong:
        raise StorageError(
            f"the checkpoint's tensors do not fit {len(wrong)} of {len(built)} layers: {'; '.join(wrong[:3])}. Is "
            "quantization_config in its config.json the one that it was written with?"
        )
