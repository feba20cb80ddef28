"""Captured graphs against the eager model, over model families: outputs and every gradient, in both modes, at other sizes."""

import copy
import functools

import pytest
import torch
from families import FAMILIES, assert_equal, captured

import peft_fx


@functools.cache
def pair(name):
    """(a copy of the model, its graph); the two share nothing, so that gradients and buffers do not mix."""
    model, graph = captured(FAMILIES[name])
    return copy.deepcopy(model), graph


def inputs(family, batch, length):
    return family.numbers(batch, length, torch.Generator().manual_seed(batch * 100 + length))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if f.slow else n for n, f in FAMILIES.items()]
)
def test_outputs_and_gradients_equal_the_eager_models(name, training):
    family = FAMILIES[name]
    reference, graph = pair(name)
    assert list(graph.state_dict()) == list(reference.state_dict())
    reference.train(training), graph.train(training)
    for batch, length in family.sizes:
        assert_equal(graph, reference, inputs(family, batch, length))
    for key, buffer in reference.named_buffers():
        torch.testing.assert_close(dict(graph.named_buffers())[key], buffer, msg=key)


def test_a_size_that_the_model_fixed_is_refused_at_the_call():
    _, graph = pair("mamba")
    with pytest.raises(peft_fx.GraphError, match=r"input_ids = \[any, 7\], called with \[2, 9\]"):
        graph(**inputs(FAMILIES["mamba"], 2, 9))
