"""Fixtures for all tests."""

import gc
import math
import os

# Read when huggingface_hub is imported; a try without a network takes 20 s.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

# Files that take a minute or more. First, so that no worker begins one when the others are done.
LONG = (
    "conformance_peft", "conformance_definition", "smollm2", "package", "stamp", "compile", "backend", "hf", "hf_seeds",
    "moe_targets", "hf_trl", "published", "hf_smollm2", "capture_families", "hotswap", "concurrency",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in LONG)


def pytest_sessionfinish():
    """pytest sweeps the garbage several times at its end. Over all graphs that tests made this outlasts what xdist waits for a
    worker, which it then interrupts, with a traceback."""
    gc.freeze()


@pytest.fixture
def fresh_dynamo():
    """Nothing compiled, and nothing counted, by the tests before."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def smollm2():
    """(model, tokenizer) of SmolLM2-135M; skipped where the weights cannot be had."""
    from tools.smollm2 import Unavailable, load

    try:
        return load()
    except Unavailable as error:
        pytest.skip(f"SmolLM2 cannot be fetched: {error}")


# The share of the activation form's cost below which the weight form is chosen, so that there is no choice.
FORMS = {"activation": 0.0, "weight": math.inf}


def choose(monkeypatch, form):
    from peft_fx.passes.inject import inject

    monkeypatch.setattr(inject, "CHEAPER", FORMS[form])


@pytest.fixture
def activation_form(monkeypatch):
    """What has an activation form takes it, whatever is counted: for tests of that form through `get_peft_model` and the like,
    which take no `lowering=`. A test says why it needs it."""
    choose(monkeypatch, "activation")


@pytest.fixture(params=FORMS)
def each_form(request, monkeypatch):
    """The test runs once with each form, where there are both: for what does not take `lowering=`."""
    choose(monkeypatch, request.param)
