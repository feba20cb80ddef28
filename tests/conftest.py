"""Fixtures for all tests."""

import os

# Read when huggingface_hub is imported; a try without a network takes 20 s.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from peft_fx.passes import inject

COUNTED = inject.CHEAPER
# At the sizes of most tests a count says nothing about real ones: what has an activation form takes it.
inject.CHEAPER = 0.0


@pytest.fixture(autouse=True)
def counted_forms(request, monkeypatch):
    """Tests marked `counted` choose forms as users get them."""
    if "counted" in request.keywords:
        monkeypatch.setattr(inject, "CHEAPER", COUNTED)
