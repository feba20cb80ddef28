"""What the rotating methods do while training (blocks left out), and on stacks of experts."""

import itertools

import conformance as c
import pytest
import torch

import peft_fx as fx
from peft_fx.methods import get_config, get_method
from peft_fx.methods.boft import rotations
from peft_fx.methods.stacked import on_target
from peft_fx.target import Target

pytestmark = pytest.mark.slow

OFT = {"peft_type": "OFT", "target_modules": ["layer"], "oft_block_size": 4, "module_dropout": 0.5}
BOFT = {
    "peft_type": "BOFT", "target_modules": ["layer"], "boft_block_size": 2, "boft_n_butterfly_factor": 2,
    "boft_dropout": 0.5,
}  # fmt: skip
SUBJECTS = ["wide", "wide_Conv1D", "wide_conv2d", "wide_conv2d_grouped"]
FORMS = [(s, f) for s in SUBJECTS for f in ("activation", "weight") if f == "weight" or "conv" not in s]


def left_out(options, subject, lowering, tensor, blocks):
    """The outputs while training, for several seeds, and those with each possible set of blocks set to zero."""
    tuned = fx.apply(c.captured(subject), options, lowering=lowering)
    c.randomise(tuned)
    (v,) = [p for n, p in tuned.named_parameters() if n.endswith(tensor)]
    whole, x = v.detach().clone(), c.inputs(subject)
    possible = {}
    for out in blocks(whole.shape):
        with torch.no_grad():
            for index in out:
                v[index] = 0
        possible[out] = tuned(**x).detach()
        with torch.no_grad():
            v.copy_(whole)
    assert torch.equal(tuned(**x), possible[()])
    tuned.train()
    found = []
    for seed in range(12):
        torch.manual_seed(seed)
        y = tuned(**x).detach()
        (same,) = [out for out, expected in possible.items() if torch.allclose(y, expected, atol=1e-5)]
        found.append(same)
    tuned(**x).sum().backward()
    assert v.grad is not None
    assert c.error(c.run(fx.merge(tuned.eval()), subject), [possible[()]]) <= 1e-5
    return found


@pytest.mark.parametrize(
    ("subject", "lowering"), [*FORMS, ("wide_embedding", "activation"), ("wide_embedding", "weight")]
)
def test_oft_leaves_each_block_out_at_random_while_training(subject, lowering):
    subsets = lambda shape: [s for k in range(shape[0] + 1) for s in itertools.combinations(range(shape[0]), k)]  # noqa: E731
    assert len(set(left_out(OFT, subject, lowering, "oft_R", subsets))) > 2


@pytest.mark.parametrize(("subject", "lowering"), FORMS)
def test_boft_leaves_half_the_blocks_of_one_factor_out_while_training(subject, lowering):
    def sets(shape):
        N, D = shape[:2]
        some = [tuple((i, d) for d in out) for i in range(N) for out in itertools.combinations(range(D), D // 2)]
        return [(), *some]

    found = left_out(BOFT, subject, lowering, "boft_R", sets)
    assert () not in found
    assert {out[0][0] for out in found} == {0, 1}


def test_boft_chooses_factor_and_blocks_uniformly():
    torch.manual_seed(0)
    R, eye = torch.randn(3, 5, 2, 2), torch.eye(2)
    counts = torch.zeros(3, 5)
    for _ in range(3000):
        out = (torch.stack(rotations(R, 0.5)) == eye).all(-1).all(-1)
        assert sorted(out.sum(1).tolist()) == [0, 0, 2]
        counts += out
    assert ((counts - 400).abs() < 80).all()  # 3000 / 3 * 2 / 5


def test_boft_dropout_of_less_than_a_block_drops_nothing():
    R = torch.randn(2, 5, 2, 2)
    assert all(torch.equal(a, b) for a, b in zip(rotations(R, 0.19), rotations(R, 0.0), strict=True))


STACK = Target("m", "experts", "expert", (3, 12, 8), file_path="m", by_parameter=True)
ALONE = Target("m", "weight", "linear", (12, 8), file_path="m")
EXPERTS = [
    ("BOFT", {"boft_block_size": 2, "boft_n_butterfly_factor": 2}),
    ("OFT", {"oft_block_size": 4}),
    ("OFT", {"oft_block_size": 4, "coft": True, "eps": 0.3, "use_cayley_neumann": False}),
    ("HRA", {"r": 4}),
    ("HRA", {"r": 3, "apply_GS": True}),
    ("C3A", {"block_size": 4}),
    ("PSOFT", {"r": 4}),
    ("ROAD", {"group_size": 4, "variant": "road_4"}),
]


@pytest.mark.parametrize(("name", "options"), EXPERTS, ids=str)
def test_a_stack_of_experts_is_adapted_one_by_one(name, options):
    torch.manual_seed(0)
    config = get_config(name)(**options)
    one, specs = get_method(name), on_target(get_method(name), STACK).tensors(STACK, config)
    method, W = on_target(get_method(name), STACK, specs), torch.randn(STACK.shape, dtype=torch.float64)
    theta = {}
    for key, spec in specs.items():
        theta[key] = torch.empty(spec.shape, dtype=torch.float64)
        spec.init(theta[key], W, *(theta[n] for n in spec.needs))
        theta[key] += 0.1 * torch.randn(spec.shape, dtype=torch.float64) if spec.trainable else 0
    stacked, _ = method.training_weight(W, None, theta, STACK, config)
    for e in range(3):
        expected, _ = one.weight(W[e], None, {k: t[e] for k, t in theta.items()}, ALONE, config)
        assert torch.allclose(stacked[e], expected, atol=1e-12)


@pytest.mark.parametrize(("name", "options"), EXPERTS, ids=str)
def test_experts_of_a_model_train_and_merge(name, options):
    options = {"peft_type": name, "target_parameters": ["mlp.experts.down_proj"], **options}
    tuned = fx.apply(c.captured("mixtral"), options)
    c.randomise(tuned)
    assert c.error(c.run(fx.merge(tuned), "mixtral"), c.run(tuned, "mixtral")) <= 1e-5
    tuned.train()
    c.loss(c.floats(tuned(**c.inputs("mixtral")))).backward()
    assert all(p.grad is not None for p in tuned.parameters() if p.requires_grad)
