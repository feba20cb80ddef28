"""Methods on what is not one layer's weight: stacks of experts, both projections of MultiheadAttention, against the definition."""

import conformance as c
import pytest
import torch
from peft_fx.passes.forms.lowering import from_canonical, to_canonical

import peft_fx as fx
from methods import MODULES
from peft_fx.store.state import state_of
from peft_fx.store.tensors import get_tensor

pytestmark = pytest.mark.slow

CASES = [
    ("VERA", {"r": 4}),
    ("RANDLORA", {"r": 3, "randlora_alpha": 6}),
    ("VBLORA", {"r": 3, "num_vectors": 6, "vector_length": 4}),
    ("VBLORA", {"r": 3, "num_vectors": 6, "vector_length": 4, "topk": 3, "save_only_topk_weights": True}),
    ("UNILORA", {"r": 3, "theta_d_length": 13}),
    ("UNILORA", {"r": 3, "theta_d_length": 13, "save_indices": True}),
    ("TINYLORA", {"r": 3, "u": 5}),
    ("TINYLORA", {"r": 3, "u": 5, "weight_tying": 1.0}),
    ("SHIRA", {"r": 2}),
    ("SUPERTUNING", {"sparsity": 0.5}),
    ("SUPERTUNING", {"sparsity": 0.8, "r": 3}),
    ("IA3", {"feedforward_modules": []}),
    ("DEFT", {"r": 3, "alpha": 2}),
    ("DEFT", {"r": 3, "decomposition_method": "qr"}),
    ("DELORA", {"r": 3}),
    ("FOURIERFT", {"n_frequency": 20, "scaling": 40.0}),
    ("FROD", {"sparse_rate": 0.1}),
    ("GLORA", {"r": 3}),
    ("GLORA", {"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"}),
    ("MISS", {"r": 3}),
    ("OSF", {}),
    ("PEANUT", {"r": 3, "act_fn": "tanh", "depth": 2, "scaling": 0.5}),
    ("WAVEFT", {"n_frequency": 20}),
]
EXPERTS = {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
PLACES = [("mixtral", EXPERTS), ("attention", {"target_modules": ["attn"]})]


def numbers(tuned, p) -> dict[str, torch.Tensor]:
    """Name -> float64 numbers of a placement."""
    found = {name: get_tensor(tuned, f"peft_fx.adapters.{p.resolve(name).name}").detach() for name in p.tensors}
    return {name: t.double() if t.is_floating_point() else t for name, t in found.items()}


def defined(tuned, p, keys, more, options, W, b):
    """The weight and bias that the definition gives, one expert after the other. keys: of names in files."""
    found, canonical = numbers(tuned, p), to_canonical(W, p.target)

    def one(W, e):
        tensors = {
            keys.get(name, name): found[name] if e is None or not spec.stacked else found[name][e]
            for name, spec in p.tensors.items()
        }
        return MODULES[p.method].definition(W, b, tensors | more, options)

    if p.target.experts is None:
        new, b = one(canonical, None)
    else:
        new = torch.stack([one(W, e)[0] for e, W in enumerate(canonical)])
    return from_canonical(new, p.target), b


@pytest.mark.parametrize(("subject", "place"), PLACES, ids=[name for name, _ in PLACES])
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_every_weight_there_is_the_definition_s_and_files_bring_it_back(name, options, subject, place, tmp_path):
    tuned = fx.apply(c.captured(subject), {"peft_type": name, **place, **options})
    c.randomise(tuned)
    state, base = state_of(tuned), c.build(subject).double().state_dict()
    merged = fx.merge(tuned)
    chosen = state.recipe["default"].placements
    assert len(chosen) == 2
    keys = {name: spec.key for p in reversed(chosen) for name, spec in p.tensors.items() if spec.key}
    dealt = [i.flatten() for p in chosen for name, i in numbers(tuned, p).items() if name.startswith("unilora_indices")]
    more = {"occurrences": torch.bincount(torch.cat(dealt))} if dealt else {}
    for p in chosen:
        W, b = defined(tuned, p, keys, more, options, base[p.target.name], base.get(p.target.bias_name))
        assert c.error([get_tensor(merged, p.target.name).detach()], [W]) <= 1e-5
        if b is not None:
            assert c.error([get_tensor(merged, p.target.bias_name).detach()], [b]) <= 1e-5
    assert c.error(c.run(merged, subject), c.run(tuned, subject)) <= 1e-5
    fx.save_adapter(tuned, tmp_path)
    back = fx.load_adapter(c.captured(subject), tmp_path)
    assert c.error(c.run(back, subject), c.run(tuned, subject)) <= 1e-6
