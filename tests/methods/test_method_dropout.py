"""Dropout of rows and of whole updates, which LoHa and LoKr have: masks that follow the graph's mode, in the weight form too."""

import conformance as c
import pytest
import torch

import peft_fx as fx

SUBJECTS = pytest.mark.parametrize("subject", ["wide", "wide_Conv1D", "wide_conv2d", "wide_embedding"])
# method, options, whether the rows that are kept are divided by their share
METHODS = pytest.mark.parametrize(
    "method, options, scaled",
    [
        ("LOHA", {}, True),
        ("LOHA", {"use_effective_conv2d": True}, True),
        ("LOKR", {}, False),
        ("LOKR", {"rank_dropout_scale": True}, True),
        ("LOKR", {"r": 1, "use_effective_conv2d": True}, False),
    ],
)


def factors(subject, method, options) -> tuple[list, torch.Tensor]:
    """Per seed and output feature: the update while training over the one in evaluation."""
    tuned = fx.apply(c.captured(subject), {"peft_type": method, "target_modules": ["layer"], "r": 3, **options})
    c.randomise(tuned)
    x, axis = c.inputs(subject), 1 if "conv" in subject else -1
    base = c.captured(subject)(**x)

    def update():
        return (tuned(**x) - base).detach().movedim(axis, -1).flatten(0, -2)

    exact, found = update(), []
    assert c.error(c.run(fx.merge(tuned), subject), c.run(tuned, subject)) <= 1e-5
    tuned.train()
    for seed in range(6):
        torch.manual_seed(seed)
        dropped = update()
        ratio = (dropped * exact).sum(0) / exact.square().sum(0)
        assert torch.allclose(dropped, ratio * exact, atol=1e-4)
        found.append(ratio)
    tuned.eval()
    assert torch.equal(update(), exact)
    return torch.stack(found)


@SUBJECTS
@METHODS
def test_rank_dropout_zeroes_output_features_of_the_update_while_training(subject, method, options, scaled):
    for ratio in factors(subject, method, {"rank_dropout": 0.4, **options}):
        kept = ratio.abs() > 1e-3
        expected = kept / kept.float().mean() if scaled else kept.float()
        assert torch.allclose(ratio, expected, atol=1e-3)
        assert not kept.all()


@SUBJECTS
@METHODS
def test_module_dropout_drops_the_whole_update_unscaled_while_training(subject, method, options, scaled):
    found = factors(subject, method, {"module_dropout": 0.5, **options})
    kept = found.mean(1).round()
    assert torch.allclose(found, kept.unsqueeze(1).expand_as(found), atol=1e-3)
    assert set(kept.tolist()) == {0.0, 1.0}
