"""Fixtures for all tests."""

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
