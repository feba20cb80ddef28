"""peft_fx: parameter-efficient fine-tuning by rewriting torch.fx graphs.

    graph = peft_fx.capture(model)
    tuned = peft_fx.apply(graph, {"peft_type": "LORA", "r": 16, "target_modules": "all-linear"})

The verbs below are free functions over `torch.fx.GraphModule`.
"""

from .adapters import apply, delete_adapter, disable_adapter, load_adapter, save_adapter, set_adapter
from .capture import capture
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
from .explain import explain, trainable_parameters
from .export import export, load
from .hotswap import hotswap, prepare_hotswap
from .merge import merge, unmerge
from .methods.lora import LoraConfig
from .recipe import Recipe

__all__ = [
    "AdapterConfig", "AdapterFileError", "CaptureError", "GraphError", "HotswapError", "LoraConfig", "MergeError",
    "PeftFxError", "Recipe", "RecipeError", "apply", "capture", "delete_adapter", "disable_adapter", "explain", "export",
    "hotswap", "load", "load_adapter", "merge", "prepare_hotswap", "save_adapter", "set_adapter", "trainable_parameters",
    "unmerge",
]  # fmt: skip
