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


@pytest.mark.parametrize("seed", [None, 7])
def test_gradients_while_training_are_peft_s(tmp_path, seed):
    theirs, tuned = both(tmp_path, generator_seed=seed)
    theirs.train(), tuned.train()
    expected = c.gradients(theirs, "wide", lambda f: c.save_peft(theirs, f))
    assert c.error(c.gradients(tuned, "wide", lambda f: fx.save_adapter(tuned, f)), expected) <= 1e-5


@pytest.mark.parametrize("sample", [False, True])
def test_a_generator_s_seed_gives_peft_s_sequence_of_noise(tmp_path, sample):
    theirs, tuned = both(
        tmp_path, "llama", target_modules=["q_proj", "up_proj"], generator_seed=7, sample_at_inference=sample
    )
    exact = c.run(tuned, "llama")
    assert c.error(exact, c.run(theirs, "llama")) <= 1e-5
    theirs.train(), tuned.train()
    steps = [(c.run(tuned, "llama"), c.run(theirs, "llama")) for _ in range(3)]
    for ours, expected in steps:
        assert c.error(ours, expected) <= 1e-5
    assert c.error(steps[0][0], steps[1][0]) > 1e-3
    assert (c.error(c.run(tuned.eval(), "llama"), exact) > 1e-3) == sample


def test_the_generator_s_state_moves_on_in_compiled_and_saved_graphs_too(tmp_path):
    eager, compiled, saved = (both(tmp_path, generator_seed=7, sample_at_inference=True)[1] for _ in range(3))
    fx.export(saved, tmp_path / "graph.pt2")
    others = torch.compile(compiled, fullgraph=True, backend="aot_eager"), fx.load(tmp_path / "graph.pt2")
    steps = [c.run(eager, "wide") for _ in range(3)]
    assert not torch.equal(steps[0][0], steps[1][0])
    for other in others:
        assert all(c.error(c.run(other, "wide"), step) <= 1e-6 for step in steps)


@pytest.mark.parametrize(
    "subject", ["wide_conv1d", "wide_conv2d", "wide_conv2d_grouped", "wide_conv3d", "wide_embedding"]
)
def test_other_operators_have_noise_around_the_mean_while_training(subject):
    tuned = fx.apply(c.captured(subject), {**OPTIONS, "generator_seed": 7})
    c.randomise(tuned)
    mean = c.run(tuned, subject)
    tuned.train()
    noisy = torch.stack([c.run(tuned, subject)[0] for _ in range(400)])
    assert c.error([noisy[0]], mean) > 1e-2
    spread = noisy.std(0).amax()
    assert (noisy.mean(0) - mean[0]).abs().amax() <= 6 * spread / 400**0.5
    assert all(map(torch.equal, c.run(tuned.eval(), subject), mean))


def test_a_weight_form_that_would_lose_the_noise_is_refused():
    with pytest.raises(fx.RecipeError, match="noise while training needs the activation form"):
        fx.apply(c.captured("views"), {**OPTIONS, "target_modules": None, "target_parameters": ["inner.in_out"]})
