"""PEFT's adapter folders: `adapter_config.json` and `adapter_model.safetensors`; LoRA files of other programs."""

from .match import match_tensors
from .read import read_adapter, read_config, read_tensors
from .write import file_config, write_adapter

__all__ = ["file_config", "match_tensors", "read_adapter", "read_config", "read_tensors", "write_adapter"]
