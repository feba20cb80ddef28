"""peft_fx: parameter-efficient fine-tuning by rewriting torch.fx graphs.

    graph = peft_fx.capture(model)
    tuned = peft_fx.apply(graph, {"peft_type": "LORA", "r": 16, "target_modules": "all-linear"})

The verbs below are free functions over `torch.fx.GraphModule`.
"""

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
from .methods.lora import LoraConfig
from .methods.own import method
from .recipe import Recipe
from .verbs.adapters import apply, delete_adapter, disable_adapter, load_adapter, save_adapter, set_adapter
from .verbs.capture.model import capture
from .verbs.explain import explain, trainable_parameters
from .verbs.export import export, load
from .verbs.hotswap import hotswap, prepare_hotswap
from .verbs.merge import merge, unmerge

__all__ = [
    "AdapterConfig", "AdapterFileError", "CaptureError", "GraphError", "HotswapError", "LoraConfig", "MergeError",
    "PeftFxError", "Recipe", "RecipeError", "apply", "capture", "delete_adapter", "disable_adapter", "explain",
    "export", "hotswap", "load", "load_adapter", "merge", "method", "prepare_hotswap", "save_adapter",
    "set_adapter", "trainable_parameters", "unmerge",
]  # fmt: skip
