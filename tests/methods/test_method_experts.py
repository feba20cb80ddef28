"""Methods that take a stack of experts treat each of them as a matrix of its own."""

import pytest
import torch

import peft_fx as fx
from peft_fx.methods import get_config, get_method
from peft_fx.methods.stacked import on_target
from peft_fx.target import Target

STACK = Target("m", "experts", "expert", (3, 12, 8), file_path="m", by_parameter=True)
ALONE = Target("m", "weight", "linear", (12, 8), file_path="m")
CASES = [
    ("MISS", {"r": 3}),
    ("MISS", {"r": 4, "init_weights": "mini", "mini_r": 3}),
    ("MISS", {"r": 4, "init_weights": "bat"}),
    ("DELORA", {"r": 4}),
    ("DEFT", {"r": 4}),
    ("DEFT", {"r": 4, "decomposition_method": "qr"}),
    ("PEANUT", {"r": 4, "depth": 1}),
    ("OSF", {"effective_rank": 3}),
    ("GLORA", {"r": 3}),
    ("GLORA", {"config_A_B": "vector"}),
    ("FOURIERFT", {"n_frequency": 20}),
    ("WAVEFT", {"n_frequency": 20, "wavelet_family": "db2", "init_weights": False}),
    ("ADALORA", {"init_r": 3, "total_step": 10}),
    ("LORA", {"r": 3, "use_dora": True}),
    ("HIRA", {"r": 3}),
    ("GRALORA", {"r": 4, "hybrid_r": 3}),
    ("LOHA", {"r": 3}),
    ("LOKR", {"r": 4}),
    ("LOKR", {"r": 1, "decompose_both": True}),
]


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_a_stack_of_experts_is_adapted_one_by_one(name, options):
    torch.manual_seed(0)
    config = get_config(name)(**options)
    alone = get_method(name).at(ALONE, config)
    specs = on_target(alone, STACK).tensors(STACK, config)
    method = on_target(alone, STACK, specs)
    assert method.check(STACK, config) is None
    W = torch.randn(STACK.shape, dtype=torch.float64)
    theta = {}
    for key, spec in specs.items():
        theta[key] = torch.empty(spec.shape, dtype=spec.dtype or torch.float64)
        spec.init(theta[key], W, *(theta[n] for n in spec.needs))
        theta[key] += 0.1 * torch.randn(spec.shape, dtype=torch.float64) if spec.trainable else 0
    stacked, _ = method.weight(W, None, theta, STACK, config)
    for e in range(3):
        one = {k: t[e] if specs[k].stacked else t for k, t in theta.items()}
        expected, _ = alone.weight(W[e], None, one, ALONE, config)
        assert torch.allclose(stacked[e], expected, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "other"),
    [
        ({"peft_type": "DEFT", "r": 4}, {"decomposition_method": "qr"}),
        ({"peft_type": "PEANUT", "r": 4}, {"act_fn": "tanh"}),
    ],
    ids=str,
)
def test_a_hotswap_is_refused_where_the_graph_was_made_for_another_function(options, other, tmp_path):
    import conformance as c

    options = {**options, "target_modules": ["layer"]}
    tuned = fx.apply(c.captured("wide"), options)
    fx.save_adapter(fx.apply(c.captured("wide"), {**options, **other}), tmp_path)
    with pytest.raises(fx.HotswapError, match="the resident graph was made for"):
        fx.hotswap(tuned, tmp_path)
