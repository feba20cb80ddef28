"""Hotswap of every method: the same config with other numbers, and smaller adapters in larger slots where zeros change nothing."""

import conformance as c
import pytest
import torch
from methods import MODULES, cells, label

import peft_fx as fx

pytestmark = pytest.mark.slow

CELLS = cells("PEFT") + cells("DEFINED")
LAYER = {"target_modules": ["layer"]}
FIRST = {name: next(x for x in CELLS if x[0] == name) for name in MODULES}

# peft_type, common options, what the slot has, what is smaller; on a linear weight (12, 8).
PADDED = [
    ("LORA", {}, {"r": 4}, {"r": 2, "lora_alpha": 3}),
    ("LORA", {"use_dora": True}, {"r": 4}, {"r": 1}),
    ("ADALORA", {"total_step": 9}, {"init_r": 4}, {"init_r": 2}),
    ("ADAMSS", {"num_subspaces": 3}, {"subspace_rank": 2}, {"subspace_rank": 1}),
    ("DEFT", {}, {"r": 4}, {"r": 2, "alpha": 5}),
    ("DEFT", {"para": True}, {"r": 4}, {"r": 3}),
    ("DELORA", {}, {"r": 4}, {"r": 2}),
    ("GLORA", {}, {"r": 3}, {"r": 2}),
    ("GRALORA", {"gralora_k": 2}, {"r": 8}, {"r": 4}),
    ("HIRA", {}, {"r": 3}, {"r": 2}),
    ("HRA", {}, {"r": 4}, {"r": 2}),
    ("LILY", {}, {"r": 4}, {"r": 2}),
    ("LOHA", {}, {"r": 3}, {"r": 2}),
    ("LOKR", {"decompose_factor": 1}, {"r": 3}, {"r": 2}),
    ("PEANUT", {"depth": 2}, {"r": 4}, {"r": 2}),
    ("PVERA", {}, {"r": 4}, {"r": 2}),
    ("SHIRA", {}, {"r": 2}, {"r": 1}),
    ("SUPERTUNING", {"sparsity": 0.5}, {"r": 4}, {"r": 2}),
    ("TINYLORA", {}, {"r": 4, "u": 5}, {"r": 2, "u": 3}),
    ("UNILORA", {}, {"r": 4, "theta_d_length": 16}, {"r": 2, "theta_d_length": 9}),
    ("VERA", {}, {"r": 4}, {"r": 2}),
    ("VERA", {"save_projection": False}, {"r": 4}, {"r": 3, "projection_prng_key": 9}),
]  # fmt: skip
FIXED = [
    ("BOFT", {"boft_block_size": 4}, {"boft_block_size": 2}, "blocks say which features are rotated together"),
    ("C3A", {"block_size": 4}, {"block_size": 2}, "block_size says which features a kernel turns"),
    ("DEFT", {"r": 4, "decomposition_method": "qr"}, {"r": 2, "decomposition_method": "qr"}, "qr makes of zeros"),
    ("FOURIERFT", {"n_frequency": 20}, {"n_frequency": 9}, "positions of their own"),
    ("FROD", {"sparse_rate": 0.2}, {"sparse_rate": 0.1}, "positions of their own"),
    ("MISS", {"r": 4}, {"r": 2}, "r says which input features share a row"),
    ("OFT", {"oft_block_size": 4}, {"oft_block_size": 2}, "size of the blocks says"),
    ("OSF", {"effective_rank": 4}, {"effective_rank": 3}, "where the decomposition of the weight is cut"),
    ("PEANUT", {"r": 4, "act_fn": "sigmoid"}, {"r": 2, "act_fn": "sigmoid"}, "activation of zero is not zero"),
    ("PSOFT", {"r": 4}, {"r": 3}, "angles of a rotation are numbered by r"),
    ("RANDLORA", {"r": 4}, {"r": 2}, "r says how many bases there are"),
    ("SUPERTUNING", {"sparsity": 0.5}, {"sparsity": 0.75}, "positions of their own"),
    ("VBLORA", {**FIRST["VBLORA"][1], "r": 3}, {**FIRST["VBLORA"][1], "r": 2}, "logits of zero choose vectors too"),
    ("WAVEFT", {"n_frequency": 20}, {"n_frequency": 9}, "positions of their own"),
]  # fmt: skip
NO_SIZE = {"BEFT", "IA3", "LN_TUNING", "ROAD"}
TOKENS = "TRAINABLE_TOKENS"


def made(subject, config, folder, seed):
    """An adapter with numbers of its own, saved."""
    tuned = fx.apply(c.captured(subject), config)
    c.randomise(tuned, seed)
    fx.save_adapter(tuned, folder)
    return tuned


def same_file(graph, other):
    ours, theirs = (c.saved(lambda f, g=g: fx.save_adapter(g, f)) for g in (graph, other))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_every_method_is_in_a_table():
    variants = {name for name, module in MODULES.items() if hasattr(module, "TYPE")}
    known = {x[0] for x in PADDED} | {x[0] for x in FIXED} | NO_SIZE | {TOKENS}
    assert known >= MODULES.keys() - variants


def options():
    """One cell for each method's options; the first of each method in the quick run."""
    seen = {}
    for cell in CELLS:
        seen.setdefault((cell[0], str(cell[1])), cell)
    return [pytest.param(x, marks=() if x is FIRST[x[0]] else pytest.mark.slow, id=label(x)) for x in seen.values()]


@pytest.mark.parametrize("cell", options())
def test_other_numbers_in_the_same_config_are_those_of_a_fresh_load(cell, tmp_path):
    _, config, subject = cell
    graph = made(subject, config, tmp_path / "a", 3)
    other = made(subject, config, tmp_path / "b", 5)
    before = c.run(graph, subject)
    report = fx.hotswap(graph, tmp_path / "b")
    assert report.tensors and not report.zeroed and not report.padded
    fresh = fx.load_adapter(c.captured(subject), tmp_path / "b")
    assert c.error(c.run(graph, subject), c.run(fresh, subject)) <= 1e-6
    assert c.error(c.run(graph, subject), before) > 1e-6
    same_file(graph, other)


@pytest.mark.parametrize("name, common, large, small", PADDED, ids=str)
def test_a_smaller_adapter_in_a_larger_slot_is_itself(name, common, large, small, tmp_path):
    config = {"peft_type": name, **LAYER, **common}
    graph = made("wide", {**config, **large}, tmp_path / "large", 3)
    full = c.run(graph, "wide")
    other = made("wide", {**config, **small}, tmp_path / "small", 5)
    compiled = torch.compile(graph, fullgraph=True, backend="aot_eager")
    c.run(compiled, "wide")
    with torch.compiler.set_stance("fail_on_recompile"):
        assert fx.hotswap(compiled, tmp_path / "small").padded
        assert c.error(c.run(compiled, "wide"), c.run(other, "wide")) <= 1e-6
        same_file(graph, other)
        fx.hotswap(compiled, tmp_path / "large")
        assert c.error(c.run(compiled, "wide"), full) <= 1e-6


@pytest.mark.parametrize("name, common, large, small", PADDED, ids=str)
def test_what_is_padded_stays_so_in_training(name, common, large, small, tmp_path):
    config = {"peft_type": name, **LAYER, **common}
    graph = made("wide", {**config, **large}, tmp_path / "large", 3)
    other = made("wide", {**config, **small}, tmp_path / "small", 5)
    fx.hotswap(graph, tmp_path / "small")
    for g in (graph, other):
        optimizer = torch.optim.SGD([p for p in g.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            c.loss(c.floats(g(**c.inputs("wide")))).backward()
            optimizer.step()
    assert c.error(c.run(graph, "wide"), c.run(other, "wide")) <= 1e-5
    ours, theirs = (c.saved(lambda f, g=g: fx.save_adapter(g, f)) for g in (graph, other))
    assert c.error(ours, theirs) <= 1e-5


@pytest.mark.parametrize("name, large, small, reason", FIXED, ids=str)
def test_what_cannot_be_padded_is_refused_with_the_reason(name, large, small, reason, tmp_path):
    config = {"peft_type": name, **LAYER}
    graph = made("wide", {**config, **large}, tmp_path / "large", 3)
    made("wide", {**config, **small}, tmp_path / "small", 5)
    before = c.run(graph, "wide")
    with pytest.raises(fx.HotswapError, match=f"(?s)nothing was changed.*{name}.*{reason}"):
        fx.hotswap(graph, tmp_path / "small")
    assert all(torch.equal(a, b) for a, b in zip(c.run(graph, "wide"), before, strict=True))


def test_fewer_tokens_are_refused_with_the_reason(tmp_path):
    config = {"peft_type": TOKENS, **LAYER}
    graph = made("wide_embedding", {**config, "token_indices": [1, 2, 3]}, tmp_path / "large", 3)
    made("wide_embedding", {**config, "token_indices": [1, 2]}, tmp_path / "small", 5)
    with pytest.raises(fx.HotswapError, match="token ids of their own"):
        fx.hotswap(graph, tmp_path / "small")


@pytest.mark.parametrize("name", sorted(FIRST))
def test_a_config_of_another_method_is_refused(name, tmp_path):
    _, config, subject = FIRST[name]
    graph = made(subject, config, tmp_path / "a", 3)
    other = FIRST["BEFT"] if name != "BEFT" else FIRST["IA3"]
    if other[2] != subject:
        pytest.skip("no such adapter for this model")
    made(subject, other[1], tmp_path / "b", 3)
    with pytest.raises(fx.HotswapError, match=f"the resident adapter has no {other[0]} there"):
        fx.hotswap(graph, tmp_path / "b")
    assert graph.meta["peft_fx"].recipe["default"].config.peft_type == config["peft_type"]
