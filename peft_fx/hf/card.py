"""The model card that goes with an adapter's files, as the Hub reads it."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import nn

from ..config import AdapterConfig
from ..files.write import PEFT_VERSION

PIPELINES = {"CAUSAL_LM": "text-generation"}
TEXT = """# Adapter

{methods} adapter{of}, in the format of PEFT: `peft.PeftModel.from_pretrained` and `peft_fx.PeftModel.from_pretrained` read
it.
"""
VERSIONS = "### Framework versions"  # where Trainer and PEFT list theirs


def write_card(folder: Path, configs: list[AdapterConfig], model: nn.Module) -> None:
    """README.md: what it says already stays; its header names library, base model, methods and task, its end the versions."""
    file = folder / "README.md"
    base = next(filter(None, (c.base_model_name_or_path for c in configs)), None)
    base = base if base and is_hub_id(base) else None
    methods = sorted({c.peft_type for c in configs})
    if file.exists():
        card = ModelCard.load(file)
    else:
        text = TEXT.format(methods=", ".join(methods), of=f" of {base}" if base else "")
        card = ModelCard(f"---\n{ModelCardData().to_yaml()}\n---\n\n{text}")
    tags = {*(card.data.tags or ()), *(getattr(model, "model_tags", None) or ()), *(m.lower() for m in methods)}
    if hasattr(model, "config") and hasattr(model, "name_or_path"):
        tags.add("transformers")
    if base:
        tags.add(f"base_model:adapter:{base}")
        card.data.base_model = base
    card.data.library_name, card.data.tags = "peft", sorted(tags)
    tasks = (PIPELINES[c.task_type] for c in configs if c.task_type in PIPELINES)
    card.data.pipeline_tag = card.data.pipeline_tag or next(tasks, None)
    card.text = with_versions(card.text, {"PEFT": PEFT_VERSION, "peft_fx": version("peft-fx")})
    card.save(file)


def is_hub_id(name: str) -> bool:
    """Not so for a local path, with which the Hub would refuse the whole card."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


def with_versions(text: str, versions: dict[str, str]) -> str:
    """The text with a line for each library in its list of versions, in place of the line for another version of it."""
    old = re.compile(rf"- ({'|'.join(versions)}) \d\S*")
    lines = [line for line in text.rstrip().splitlines() if not old.fullmatch(line)]
    if VERSIONS not in lines:
        lines += ["", VERSIONS, ""]
    at = lines.index(VERSIONS) + 1
    while at < len(lines) and not lines[at].strip():
        at += 1
    lines[at:at] = [f"- {name} {number}" for name, number in versions.items()]
    return "\n".join(lines) + "\n"
