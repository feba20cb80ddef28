"""The model card that goes with an adapter's files, as the Hub reads it."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path
from typing import cast

import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import nn

from ...config import AdapterConfig
from ...errors import AdapterFileError
from ...files.read import file_in
from ...missing import PEFT_VERSION

CARD = "README.md"
PIPELINES = {"CAUSAL_LM": "text-generation"}
TEXT = """# Adapter

{methods} adapter{of}, in the format of PEFT: `peft.PeftModel.from_pretrained` and `peft_fx.PeftModel.from_pretrained` read
it.
"""
VERSIONS = "### Framework versions"  # where Trainer and PEFT list theirs


def card_of(folder: Path, configs: list[AdapterConfig], model: nn.Module) -> str:
    """README.md: what a folder's says stays; its header names library, base model, methods and task, its end the versions.

    Raises AdapterFileError for one that is there and is no card, or is a link out of the folder.
    """
    base = next(filter(None, (c.base_model_name_or_path for c in configs)), None)
    base = base if base and hasattr(model, "config") and is_hub_id(base) else None  # a model of no library is on no Hub
    methods = sorted({str(c.peft_type) for c in configs})
    file = file_in(folder, CARD)
    try:
        if file is None:
            text = TEXT.format(methods=", ".join(methods), of=f" of {base}" if base else "")
            card = ModelCard(f"---\n{ModelCardData().to_yaml()}\n---\n\n{text}")
        else:
            card = ModelCard.load(file)
        data = cast(ModelCardData, card.data)
        tags = {*(data.tags or ()), *(getattr(model, "model_tags", None) or ()), *(m.lower() for m in methods)}
        if hasattr(model, "config") and hasattr(model, "name_or_path"):
            tags.add("transformers")
        if base:
            tags.add(f"base_model:adapter:{base}")
            data.base_model = base
        data.library_name, data.tags = "peft", sorted(tags)
        tasks = (PIPELINES[c.task_type] for c in configs if c.task_type in PIPELINES)
        data.pipeline_tag = data.pipeline_tag or next(tasks, None)
        card.text = with_versions(card.text, {"PEFT": PEFT_VERSION, "peft_fx": version("peft-fx")})
        return str(card)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, yaml.YAMLError) as error:
        if file is None:
            raise
        reason = str(error).strip().partition("\n")[0]
        raise AdapterFileError(
            f"{file}: is no model card that can be added to: {reason}; mend its header (YAML between two lines of ---), or "
            "move the file away. Nothing was written"
        ) from error


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
