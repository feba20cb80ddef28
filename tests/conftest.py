"""Fixtures for all tests."""

import os

# Read when huggingface_hub is imported; a try without a network takes 20 s.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from peft_fx.passes import inject

COUNTED = inject.CHEAPER
# At the sizes of most tests a count says nothing about real ones: what has an activation form takes it.
inject.CHEAPER = 0.0


# Files that take a minute or more. First, so that no worker begins one when the others are done.
LONG = (
    "conformance_peft", "conformance_definition", "smollm2", "package", "stamp", "compile", "backend", "hf", "hf_seeds",
    "moe_targets", "hf_trl", "examples", "hf_smollm2", "capture_families", "hotswap", "concurrency",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in LONG)


@pytest.fixture(autouse=True)
def counted_forms(request, monkeypatch):
    """Tests marked `counted` choose forms as users get them."""
    if "counted" in request.keywords:
        monkeypatch.setattr(inject, "CHEAPER", COUNTED)
