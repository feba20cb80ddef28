"""The model card that goes with an adapter's files, as the Hub reads it."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from torch import nn

from ..config import AdapterConfig
from ..files.write import PEFT_VERSION

PIPELINES = {"CAUSAL_LM": "text-generation"}
TEXT = """# Adapter

{methods} adapter{of}, in the format of PEFT {version}: `peft.PeftModel.from_pretrained` and
`peft_fx.PeftModel.from_pretrained` read it.
"""


def write_card(folder: Path, configs: list[AdapterConfig], model: nn.Module) -> None:
    """README.md: what it says already stays, its header names library, base model, methods and task."""
    file = folder / "README.md"
    base = next((c.base_model_name_or_path for c in configs if c.base_model_name_or_path), None)
    methods = sorted({c.peft_type for c in configs})
    if file.exists():
        card = ModelCard.load(file)
    else:
        text = TEXT.format(methods=", ".join(methods), of=f" of {base}" if base else "", version=PEFT_VERSION)
        card = ModelCard(f"---\n{ModelCardData().to_yaml()}\n---\n\n{text}")
    tags = {*(card.data.tags or ()), *(m.lower() for m in methods)}
    if hasattr(model, "config") and hasattr(model, "name_or_path"):
        tags.add("transformers")
    if base:
        tags.add(f"base_model:adapter:{base}")
        card.data.base_model = base
    card.data.library_name, card.data.tags = "peft", sorted(tags)
    if pipeline := next((PIPELINES[c.task_type] for c in configs if c.task_type in PIPELINES), None):
        card.data.pipeline_tag = pipeline
    card.save(file)
