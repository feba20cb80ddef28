"""peft_fx: parameter-efficient fine-tuning by rewriting torch.fx graphs.

    graph = peft_fx.capture(model)
    tuned = peft_fx.apply(graph, {"peft_type": "LORA", "r": 16, "target_modules": "all-linear"})

The verbs below are free functions over `torch.fx.GraphModule`. What has a name here is imported when it is asked for: torch
takes a second, transformers some more.
"""

# ruff: noqa: F401  type checkers and editors read the names, Python the table
import sys
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from .hf.compat.submodules import SUBMODULES, make_submodules
from .methods import METHODS
from .missing import NAMES as MISSING
from .missing import not_yet
from .operators import register_with_torch
from .suggestions import did_you_mean

# module -> its names that are ours
_NAMES = {
    "config": ("AdapterConfig", "PeftConfig"),
    "errors": (
        "AdapterFileError", "CaptureError", "GraphError", "HotswapError", "MergeError", "PeftFxError", "RecipeError",
    ),
    "hf.ecosystem.as_peft": ("as_peft",),
    "methods.lora": ("LoraConfig",),
    "methods.own": ("method",),
    "recipe": ("Recipe",),
    "verbs.adapters": ("apply", "disable_adapter", "load_adapter", "save_adapter", "set_adapter"),
    "verbs.backend": ("backend",),
    "verbs.capture.model": ("capture",),
    "verbs.combine": ("combine",),
    "verbs.compile": ("compile", "inline", "outline"),
    "verbs.explain": ("explain", "trainable_parameters"),
    "verbs.export": ("export", "load"),
    "verbs.hotswap": ("hotswap", "prepare_swap"),
    "storage.native.loading": ("native_layers",),
    "verbs.kbit": ("prepare_kbit",),
    "verbs.merge": ("merge", "unmerge"),
    "verbs.merge_report": ("merge_report",),
    "verbs.mixed": ("mixed_batch",),
    "verbs.package": ("load_package", "package"),
    "verbs.quantization_aware": ("quantization_aware",),
    "verbs.slots": ("delete_adapter", "release", "rename", "slots"),
    "verbs.switch": ("reserve", "switch"),
    "verbs.widen": ("prepare_hotswap",),
}  # fmt: skip

# module -> its names that are PEFT's
_HF = {
    "peft_types": ("PeftType", "TaskType"),
    "hf.model.model": (
        "PeftMixedModel", "PeftModel", "PeftModelForCausalLM", "PeftModelForFeatureExtraction", "PeftModelForQuestionAnswering",
        "PeftModelForSeq2SeqLM", "PeftModelForSequenceClassification", "PeftModelForTokenClassification", "get_peft_model",
    ),
    "hf.model.functional": (
        "get_layer_status", "get_model_status", "get_peft_model_state_dict", "set_peft_model_state_dict",
    ),
    "hf.model.hotswap": ("hotswap_adapter", "hotswap_adapter_from_state_dict", "prepare_model_for_compiled_hotswap"),
    "hf.model.injection": ("inject_adapter_in_model",),
    "hf.compat.constants": (
        "NoMatchingPeftModuleError", "PEFT_TYPE_TO_CONFIG_MAPPING", "PeftError", "PeftWarning",
    ),
    "hf.compat.mappings": (
        "MODEL_TYPE_TO_PEFT_MODEL_MAPPING", "PEFT_TYPE_TO_MIXED_MODEL_MAPPING", "PEFT_TYPE_TO_TUNER_MAPPING",
    ),
    "hf.compat.helpers": ("get_peft_config", "shift_tokens_right"),
    "hf.compat.kappa": ("find_kappa_target_modules",),
    "hf.compat.kbit": ("cast_mixed_precision_params", "prepare_model_for_kbit_training"),
    "hf.model.weights": ("get_base_model_state_dict", "load_peft_weights", "set_base_model_state_dict"),
    "hf.files.auto": (
        "AutoPeftModel", "AutoPeftModelForCausalLM", "AutoPeftModelForFeatureExtraction",
        "AutoPeftModelForQuestionAnswering", "AutoPeftModelForSeq2SeqLM", "AutoPeftModelForSequenceClassification",
        "AutoPeftModelForTokenClassification",
    ),
}  # fmt: skip

if TYPE_CHECKING:
    from .config import AdapterConfig, PeftConfig
    from .errors import AdapterFileError, CaptureError, GraphError, HotswapError, MergeError, PeftFxError, RecipeError
    from .hf.compat.constants import (
        PEFT_TYPE_TO_CONFIG_MAPPING,
        NoMatchingPeftModuleError,
        PeftError,
        PeftWarning,
    )
    from .hf.compat.helpers import get_peft_config, shift_tokens_right
    from .hf.compat.kappa import find_kappa_target_modules
    from .hf.compat.kbit import cast_mixed_precision_params, prepare_model_for_kbit_training
    from .hf.compat.mappings import (
        MODEL_TYPE_TO_PEFT_MODEL_MAPPING,
        PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
        PEFT_TYPE_TO_TUNER_MAPPING,
    )
    from .hf.ecosystem.as_peft import as_peft
    from .hf.files.auto import (
        AutoPeftModel,
        AutoPeftModelForCausalLM,
        AutoPeftModelForFeatureExtraction,
        AutoPeftModelForQuestionAnswering,
        AutoPeftModelForSeq2SeqLM,
        AutoPeftModelForSequenceClassification,
        AutoPeftModelForTokenClassification,
    )
    from .hf.model.functional import (
        get_layer_status,
        get_model_status,
        get_peft_model_state_dict,
        set_peft_model_state_dict,
    )
    from .hf.model.hotswap import (
        hotswap_adapter,
        hotswap_adapter_from_state_dict,
        prepare_model_for_compiled_hotswap,
    )
    from .hf.model.injection import inject_adapter_in_model
    from .hf.model.model import (
        PeftMixedModel,
        PeftModel,
        PeftModelForCausalLM,
        PeftModelForFeatureExtraction,
        PeftModelForQuestionAnswering,
        PeftModelForSeq2SeqLM,
        PeftModelForSequenceClassification,
        PeftModelForTokenClassification,
        get_peft_model,
    )
    from .hf.model.weights import get_base_model_state_dict, load_peft_weights, set_base_model_state_dict
    from .methods.adalora import AdaLoraConfig
    from .methods.adamss import AdamssConfig
    from .methods.beft import BeftConfig
    from .methods.boft import BOFTConfig
    from .methods.c3a import C3AConfig
    from .methods.deft import DeftConfig
    from .methods.delora import DeloraConfig
    from .methods.fourierft import FourierFTConfig
    from .methods.frod import FrodConfig
    from .methods.glora import GloraConfig
    from .methods.gralora import GraloraConfig
    from .methods.hira import HiraConfig
    from .methods.hra import HRAConfig
    from .methods.ia3 import IA3Config
    from .methods.lily import LilyConfig
    from .methods.ln_tuning import LNTuningConfig
    from .methods.loha import LoHaConfig
    from .methods.lokr import LoKrConfig
    from .methods.lora import LoraConfig
    from .methods.miss import MissConfig
    from .methods.oft import OFTConfig
    from .methods.osf import OSFConfig
    from .methods.own import method
    from .methods.peanut import PeanutConfig
    from .methods.psoft import PsoftConfig
    from .methods.pvera import PveraConfig
    from .methods.randlora import RandLoraConfig
    from .methods.road import RoadConfig
    from .methods.shira import ShiraConfig
    from .methods.supertuning import SupertuningConfig
    from .methods.tinylora import TinyLoraConfig
    from .methods.trainable_tokens import TrainableTokensConfig
    from .methods.unilora import UniLoraConfig
    from .methods.vblora import VBLoRAConfig
    from .methods.vera import VeraConfig
    from .methods.waveft import WaveFTConfig
    from .peft_types import PeftType, TaskType
    from .recipe import Recipe
    from .storage.native.loading import native_layers
    from .verbs.adapters import apply, disable_adapter, load_adapter, save_adapter, set_adapter
    from .verbs.backend import backend
    from .verbs.capture.model import capture
    from .verbs.combine import combine
    from .verbs.compile import compile, inline, outline
    from .verbs.explain import explain, trainable_parameters
    from .verbs.export import export, load
    from .verbs.hotswap import hotswap, prepare_swap
    from .verbs.kbit import prepare_kbit
    from .verbs.merge import merge, unmerge
    from .verbs.merge_report import merge_report
    from .verbs.mixed import mixed_batch
    from .verbs.package import load_package, package
    from .verbs.quantization_aware import quantization_aware
    from .verbs.slots import delete_adapter, release, rename, slots
    from .verbs.switch import reserve, switch
    from .verbs.widen import prepare_hotswap

__all__ = sorted(name for names in _NAMES.values() for name in names)


# every public name -> the module that has it
_PLACES = {name: module for module, names in {**_NAMES, **_HF}.items() for name in names}
for _module, _, *_config in (entry for entry in METHODS.values() if isinstance(entry, tuple)):
    for _name in _config:
        _PLACES[_name] = f"methods.{_module}"
        _PLACES[f"{_name.removesuffix('Config')}Model"] = "hf.model.tuners"


def __getattr__(name: str) -> Any:
    if module := _PLACES.get(name):
        return getattr(import_module(f".{module}", __name__), name)
    for method in METHODS.values():
        if isinstance(method, type) and method.Config.__name__ == name:  # a user's
            return method.Config
    if not name.startswith("__") and find_spec(f"{__name__}.{name}"):
        return import_module(f".{name}", __name__)
    raise AttributeError(_no_attribute(name), name=name, obj=sys.modules[__name__])


def _no_attribute(name: str) -> str:
    if name in MISSING:
        return not_yet(f"{__name__}.{name}")
    return (
        f"module {__name__!r} has no attribute {name!r}{did_you_mean(name, [] if name.startswith('_') else __dir__())}"
    )


def __dir__() -> list[str]:
    return sorted({*_PLACES, *(name.partition(".")[0] for name in SUBMODULES)})


make_submodules(__name__)
register_with_torch()
