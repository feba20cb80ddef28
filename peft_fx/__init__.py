"""peft_fx: parameter-efficient fine-tuning by rewriting torch.fx graphs.

    graph = peft_fx.capture(model)
    tuned = peft_fx.apply(graph, {"peft_type": "LORA", "r": 16, "target_modules": "all-linear"})

The verbs below are free functions over `torch.fx.GraphModule`.
"""

from importlib import import_module

from .config import AdapterConfig
from .errors import (
    AdapterFileError,
    CaptureError,
    GraphError,
    HotswapError,
    MergeError,
    PeftFxError,
    RecipeError,
)
from .hf.submodules import make_submodules
from .kernels import butterfly, circulant, householder, noise  # noqa: F401  registers the operators that saved graphs call
from .methods import INTERNAL, METHODS, get_config
from .methods.lora import LoraConfig
from .methods.own import method
from .recipe import Recipe
from .verbs.adapters import apply, delete_adapter, disable_adapter, load_adapter, save_adapter, set_adapter
from .verbs.backend import backend
from .verbs.capture.model import capture
from .verbs.combine import combine
from .verbs.compile import compile, inline, outline
from .verbs.explain import explain, trainable_parameters
from .verbs.export import export, load
from .verbs.hotswap import hotswap, prepare_hotswap, prepare_swap
from .verbs.merge import merge, unmerge
from .verbs.mixed import mixed_batch
from .verbs.package import load_package, package
from .verbs.switch import reserve, switch

__all__ = [
    "AdapterConfig", "AdapterFileError", "CaptureError", "GraphError", "HotswapError", "LoraConfig", "MergeError",
    "PeftConfig", "PeftFxError", "Recipe", "RecipeError", "apply", "backend", "capture", "combine", "compile", "delete_adapter",
    "disable_adapter", "explain", "export", "hotswap", "inline", "load", "load_adapter", "load_package", "merge",
    "method", "mixed_batch", "outline", "package", "prepare_hotswap", "prepare_swap", "reserve", "save_adapter",
    "set_adapter", "switch", "trainable_parameters", "unmerge",
]  # fmt: skip

PeftConfig = AdapterConfig  # PEFT's name

# Names of PEFT's, imported when they are asked for: transformers takes seconds.
_HF = {
    "hf.types": ("PeftType", "TaskType"),
    "hf.model": (
        "PeftMixedModel", "PeftModel", "PeftModelForCausalLM", "PeftModelForFeatureExtraction", "PeftModelForQuestionAnswering",
        "PeftModelForSeq2SeqLM", "PeftModelForSequenceClassification", "PeftModelForTokenClassification", "get_peft_model",
    ),
    "hf.functional": (
        "get_layer_status", "get_model_status", "get_peft_model_state_dict", "hotswap_adapter",
        "hotswap_adapter_from_state_dict", "set_peft_model_state_dict",
    ),
    "hf.hotswap": ("prepare_model_for_compiled_hotswap",),
    "hf.injection": ("inject_adapter_in_model",),
    "hf.constants": (
        "MODEL_TYPE_TO_PEFT_MODEL_MAPPING", "NoMatchingPeftModuleError", "PEFT_TYPE_TO_CONFIG_MAPPING",
        "PEFT_TYPE_TO_MIXED_MODEL_MAPPING", "PEFT_TYPE_TO_TUNER_MAPPING", "PeftError", "PeftWarning",
    ),
    "hf.helpers": ("get_peft_config", "shift_tokens_right"),
    "hf.kappa": ("find_kappa_target_modules",),
    "hf.kbit": ("cast_mixed_precision_params", "prepare_model_for_kbit_training"),
    "hf.weights": ("get_base_model_state_dict", "load_peft_weights", "set_base_model_state_dict"),
    "hf.auto": (
        "AutoPeftModel", "AutoPeftModelForCausalLM", "AutoPeftModelForFeatureExtraction",
        "AutoPeftModelForQuestionAnswering", "AutoPeftModelForSeq2SeqLM", "AutoPeftModelForSequenceClassification",
        "AutoPeftModelForTokenClassification",
    ),
}  # fmt: skip
_MODULES = {name: module for module, names in _HF.items() for name in names}


def __getattr__(name: str):
    if name in _MODULES:
        return getattr(import_module(f".{_MODULES[name]}", __name__), name)
    if name.endswith("Config") and name in (configs := _configs()):
        return configs[name]
    if name.endswith("Model") and f"{name.removesuffix('Model')}Config" in _configs():
        return getattr(import_module(".hf.tuners", __name__), name)
    raise AttributeError(_no_attribute(name))


def _no_attribute(name: str) -> str:
    from .missing import NAMES, not_yet
    from .suggestions import did_you_mean

    if name in NAMES:
        return not_yet(f"{__name__}.{name}")
    public = [] if name.startswith("_") else [n for n in __dir__() if not n.startswith("_")]
    return f"module {__name__!r} has no attribute {name!r}{did_you_mean(name, public)}"


def __dir__():
    configs = _configs()
    return sorted({*globals(), *_MODULES, *configs, *(f"{name.removesuffix('Config')}Model" for name in configs)})


def _configs() -> dict[str, type[AdapterConfig]]:
    return {config.__name__: config for config in map(get_config, METHODS.keys() - INTERNAL)}


make_submodules(__name__)
