"""Dropout on the update's input: PEFT's numbers where it has the operator, the dropped input's update everywhere."""

import conformance as c
import pytest
import torch
from torch.nn import functional as F

import peft_fx as fx
from peft_fx.store.tensors import get_tensor

pytestmark = pytest.mark.slow

P = 0.4
# method, options with dropout
CASES = [
    ("VERA", {"r": 4, "init_weights": False, "vera_dropout": P}),
    ("PVERA", {"r": 4, "init_weights": False, "pvera_dropout": P}),
    ("PVERA", {"r": 4, "init_weights": False, "pvera_dropout": P, "generator_seed": 7}),
    ("RANDLORA", {"r": 3, "randlora_alpha": 6, "init_weights": False, "randlora_dropout": P}),
    ("VBLORA", {"r": 3, "num_vectors": 6, "vector_length": 4, "init_vector_bank_bound": 1.0, "vblora_dropout": P}),
    ("UNILORA", {"r": 3, "theta_d_length": 13, "init_theta_d_bound": 1.0, "unilora_dropout": P}),
    ("TINYLORA", {"r": 3, "u": 5, "init_weights": "uniform", "init_v_bound": 1.0, "tinylora_dropout": P}),
    ("MISS", {"r": 4, "init_weights": False, "miss_dropout": P}),
    ("MISS", {"r": 4, "init_weights": "mini", "mini_r": 2, "miss_dropout": P}),
    ("DELORA", {"r": 3, "delora_lambda": 4, "init_weights": False, "module_dropout": P}),
    ("FROD", {"sparse_rate": 0.2, "init_weights": False, "progressbar": False, "frod_dropout": P}),
    ("LORA", {"r": 4, "init_lora_weights": False, "lora_dropout": P}),
    ("LORA", {"r": 4, "init_lora_weights": False, "use_dora": True, "lora_dropout": P}),
    ("ADALORA", {"init_r": 4, "total_step": 10, "init_lora_weights": False, "lora_dropout": P}),
    ("HIRA", {"r": 4, "init_weights": False, "hira_dropout": P}),
    ("GRALORA", {"r": 4, "init_weights": False, "gralora_dropout": P}),
]
DEFT = [("DEFT", {"r": 3, "alpha": 2, "decomposition_method": how, "deft_dropout": P}) for how in ("relu", "qr")]
SUPRA = ("SUPERTUNING", {"sparsity": 0.8, "r": 3, "init_weights": False, "lora_dropout": P})
ELSEWHERE = ["wide_Conv1D", "wide_conv1d", "wide_conv2d_dilated", "wide_conv2d_grouped", "wide_conv3d"]


def trained(model, subject, seeds=(0, 1)):
    """Outputs while training, once per seed."""
    model.train()
    x, found = c.inputs(subject), []
    for seed in seeds:
        torch.manual_seed(seed)
        found += [t.detach() for t in c.floats(model(**x))]
    model.eval()
    return found


@pytest.mark.parametrize(("name", "options"), [*CASES, *DEFT, SUPRA], ids=str)
def test_outputs_while_training_are_peft_s_for_the_same_seed(name, options, tmp_path):
    theirs = c.peft_model("wide", {"peft_type": name, "target_modules": ["layer"], **options})
    tuned = fx.load_adapter(c.captured("wide"), c.save_peft(theirs, tmp_path), trainable=True)
    exact = c.run(tuned, "wide")
    dropped = trained(tuned, "wide")
    assert c.error(dropped, trained(theirs, "wide")) <= 1e-6
    assert c.error(dropped, exact * 2) > 1e-2
    assert all(map(torch.equal, c.run(tuned, "wide"), exact))


@pytest.mark.parametrize("subject", ELSEWHERE)
@pytest.mark.parametrize(("name", "options"), [case for case in CASES if case[0] != "PVERA"], ids=str)
def test_elsewhere_the_update_sees_the_dropped_input(name, options, subject):
    tuned = fx.apply(c.captured(subject), {"peft_type": name, "target_modules": ["layer"], **options})
    c.randomise(tuned)
    merged, base, x = fx.merge(tuned), c.captured(subject), c.inputs(subject)["x"]
    torch.manual_seed(0)
    dropped = F.dropout(x, P, True)
    with torch.no_grad():
        expected = base(x=x) + merged(x=dropped) - base(x=dropped)
    assert c.error(trained(tuned, subject, seeds=(0,)), [expected]) <= 1e-5


@pytest.mark.parametrize(("name", "options"), [case for case in [*CASES, SUPRA] if case[0] != "PVERA"], ids=str)
def test_token_ids_are_never_dropped(name, options):
    tuned = fx.apply(c.captured("wide_embedding"), {"peft_type": name, "target_modules": ["layer"], **options})
    c.randomise(tuned)
    assert all(map(torch.equal, trained(tuned, "wide_embedding", (0,)), c.run(tuned, "wide_embedding")))


@pytest.mark.parametrize("subject", ["wide", *ELSEWHERE])
@pytest.mark.parametrize(("name", "options"), DEFT, ids=str)
def test_deft_drops_the_input_of_what_it_adds_and_not_of_what_it_removes(name, options, subject):
    tuned = fx.apply(c.captured(subject), {"peft_type": name, "target_modules": ["layer"], **options})
    c.randomise(tuned)
    merged, x = fx.merge(tuned), c.inputs(subject)["x"]
    found = trained(tuned, subject, seeds=(0,))
    with torch.no_grad():
        get_tensor(tuned, "peft_fx.adapters.default.layer.on_weight.deft_R").zero_()
    removed = fx.merge(tuned)
    torch.manual_seed(0)
    dropped = F.dropout(x, P, True)
    with torch.no_grad():
        expected = removed(x=x) + merged(x=dropped) - removed(x=dropped)
    assert c.error(found, [expected]) <= 1e-5
