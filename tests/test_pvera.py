"""PVeRA's noise: PEFT's while training and under sample_at_inference, none otherwise."""

import conformance as c
import pytest
import torch

import peft_fx as fx

OPTIONS = {"peft_type": "PVERA", "r": 4, "target_modules": ["layer"], "init_weights": False}


def both(tmp_path, subject="wide", **options):
    theirs = c.peft_model(subject, {**OPTIONS, **options})
    return theirs, fx.load_adapter(c.captured(subject), c.save_peft(theirs, tmp_path), trainable=True)


@pytest.mark.parametrize("subject", ["wide", "wide_Conv1D"])
def test_training_draws_peft_s_noise_from_the_same_generator(tmp_path, subject):
    theirs, tuned = both(tmp_path, subject)
    mean = c.run(tuned, subject)
    theirs.train(), tuned.train()
    noisy = c.run(tuned, subject)  # both seed the global generator
    assert c.error(noisy, c.run(theirs, subject)) <= 1e-5
    assert c.error(noisy, mean) > 1e-2
    assert all(map(torch.equal, c.run(tuned.eval(), subject), mean))


def test_sampling_at_inference_is_peft_s_and_a_merge_has_the_mean(tmp_path):
    theirs, tuned = both(tmp_path, sample_at_inference=True)
    sampled = c.run(tuned, "wide")
    assert c.error(sampled, c.run(theirs, "wide")) <= 1e-5
    _, quiet = both(tmp_path)
    assert c.error(c.run(fx.merge(tuned), "wide"), c.run(quiet, "wide")) <= 1e-5
    assert c.error(sampled, c.run(quiet, "wide")) > 1e-2


def test_gradients_while_training_are_peft_s(tmp_path):
    theirs, tuned = both(tmp_path)
    theirs.train(), tuned.train()
    expected = c.gradients(theirs, "wide", lambda f: c.save_peft(theirs, f))
    assert c.error(c.gradients(tuned, "wide", lambda f: fx.save_adapter(tuned, f)), expected) <= 1e-5


def test_a_weight_form_that_would_lose_the_noise_is_refused():
    with pytest.raises(fx.RecipeError, match="noise while training needs the activation form"):
        fx.apply(c.captured("views"), {**OPTIONS, "target_modules": None, "target_parameters": ["inner.in_out"]})
