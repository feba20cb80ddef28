"""Adapters switched as data: gates written in place, free slots filled, nothing recompiled."""

import conformance as c
import pytest
import torch

import peft_fx as fx

TOLERANCE = 1e-5  # alone an adapter may have another form than beside another, and its roundings
LAYER = {"target_modules": ["layer"]}
LORA = {"peft_type": "LORA", "r": 2, "init_lora_weights": False, **LAYER}
METHODS = [
    ("wide", LORA),
    ("wide", {"peft_type": "OFT", "oft_block_size": 4, **LAYER}),
    ("wide", {"peft_type": "BOFT", "boft_block_size": 4, **LAYER}),
    ("wide", {"peft_type": "IA3", "feedforward_modules": [], **LAYER}),
    ("wide", {**LORA, "use_dora": True}),
    ("wide_conv2d", {"peft_type": "HIRA", "r": 2, **LAYER}),
    ("wide_conv2d", LORA),
    ("wide_embedding", LORA),
    ("wide_without_bias", {"peft_type": "BEFT", **LAYER}),
    ("llama", {**LORA, "target_modules": "all-linear"}),
]
ALL = pytest.mark.parametrize("subject, config", METHODS, ids=lambda v: v if isinstance(v, str) else v["peft_type"])


def adapter(subject, config, seed, folder):
    tuned = fx.apply(c.captured(subject), config)
    c.randomise(tuned, seed)
    fx.save_adapter(tuned, folder)
    return c.run(tuned, subject)


def forms(graph):
    return {(r.target, r.lowering) for r in fx.explain(graph).rows}


def pair(subject, config, folder):
    """A graph with adapters a and b resident, a active; what each gives alone, and the base."""
    alone = {name: adapter(subject, config, seed, folder / name) for seed, name in enumerate("ab", 3)}
    both = fx.load_adapter(c.captured(subject), folder / "a", "a")
    both = fx.load_adapter(both, folder / "b", "b")
    return both, alone, c.run(c.captured(subject), subject)


@ALL
def test_a_switch_gives_what_each_adapter_gives_alone(subject, config, tmp_path):
    """Bit for bit where both adapters have the form that they have alone: a second map of the input has the weight form, and
    nothing is counted where two share a target."""
    both, alone, base = pair(subject, config, tmp_path)
    reserved = fx.reserve(both, slots=2)
    exact = forms(fx.apply(c.captured(subject), config, "a")) == forms(fx.set_adapter(both, ["a", "b"]))
    for names, expected in (("a", alone["a"]), ("b", alone["b"]), (None, base), (["a"], alone["a"])):
        fx.switch(reserved, names)
        found = c.run(reserved, subject)
        assert c.error(found, expected) <= TOLERANCE
        assert not (exact or names is None) or all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    together = c.run(fx.set_adapter(both, ["a", "b"]), subject)
    assert fx.switch(reserved, ["a", "b"]) == {"a": 1.0}
    assert c.error(c.run(reserved, subject), together) <= TOLERANCE


@ALL
def test_switches_weights_and_a_new_adapter_recompile_nothing(subject, config, tmp_path):
    both, alone, base = pair(subject, config, tmp_path)
    expected = adapter(subject, config, 9, tmp_path / "c")
    compiled = torch.compile(fx.reserve(both, slots=3), fullgraph=True, backend="aot_eager")
    c.run(compiled, subject)
    with torch.compiler.set_stance("fail_on_recompile"):
        fx.switch(compiled, "b")
        assert c.error(c.run(compiled, subject), alone["b"]) <= TOLERANCE
        assert fx.hotswap(compiled, tmp_path / "c", "c").adapter == "c"
        assert c.error(c.run(compiled, subject), alone["b"]) <= TOLERANCE
        fx.switch(compiled, ["c"])
        assert c.error(c.run(compiled, subject), expected) <= TOLERANCE
        fx.switch(compiled, None)
        assert c.error(c.run(compiled, subject), base) <= TOLERANCE


def test_a_weight_is_a_factor_of_an_additive_update_and_an_interpolation_of_others(tmp_path):
    for subject, config in METHODS[:2]:
        both, alone, base = pair(subject, config, tmp_path / config["peft_type"])
        reserved = fx.reserve(both, slots=2)
        fx.switch(reserved, ["b"], weights=[0.25])
        expected = [y + 0.25 * (z - y) for y, z in zip(base, alone["b"], strict=True)]
        assert c.error(c.run(reserved, subject), expected) <= TOLERANCE


def test_gates_pass_gradients_to_the_adapters_that_act_only(tmp_path):
    both, _, _ = pair("wide", LORA, tmp_path)
    for p in both.parameters():
        p.requires_grad_("lora" in str(p.shape) or p.dim() == 2)
    reserved = fx.reserve(both, slots=2)
    fx.switch(reserved, "b")
    c.loss(c.floats(reserved(**c.inputs("wide")))).backward()
    norms = {n: p.grad.abs().sum() for n, p in reserved.named_parameters() if p.grad is not None and "lora_B" in n}
    assert {n.split(".")[2]: bool(v > 0) for n, v in norms.items()} == {"a": False, "b": True}


def test_a_slot_holds_any_rank_up_to_the_one_reserved(tmp_path):
    both, _, _ = pair("wide", LORA, tmp_path)
    reserved = fx.reserve(both, slots=3, max_rank=6)
    for rank in (1, 6, 3):
        expected = adapter("wide", {**LORA, "r": rank}, rank, tmp_path / str(rank))
        fx.hotswap(reserved, tmp_path / str(rank), "new")
        fx.switch(reserved, "new")
        assert c.error(c.run(reserved, "wide"), expected) <= TOLERANCE


def test_slots_are_saved_merged_exported_and_loaded(tmp_path):
    both, alone, _ = pair("wide", LORA, tmp_path)
    adapter("wide", LORA, 9, tmp_path / "c")
    reserved = fx.reserve(both, slots=3)
    fx.hotswap(reserved, tmp_path / "c", "c")
    fx.switch(reserved, "b")
    fx.save_adapter(reserved, tmp_path / "again", "c")
    assert c.error(c.saved(lambda f: fx.save_adapter(reserved, f, "c")), c.saved(
        lambda f: fx.save_adapter(fx.load_adapter(c.captured("wide"), tmp_path / "c"), f))) == 0  # fmt: skip
    assert c.error(c.run(fx.merge(reserved), "wide"), alone["b"]) <= TOLERANCE
    fx.export(reserved, tmp_path / "graph.pt2")
    loaded = fx.load(tmp_path / "graph.pt2")
    assert c.error(c.run(loaded, "wide"), alone["b"]) <= TOLERANCE
    fx.switch(loaded, "a")
    assert c.error(c.run(loaded, "wide"), alone["a"]) <= TOLERANCE
    assert {(r.adapter, r.status) for r in fx.explain(loaded).rows} >= {("a", "active"), ("b", "resident")}


def test_misuse_is_refused_and_changes_nothing(tmp_path):
    both, alone, _ = pair("wide", LORA, tmp_path)
    with pytest.raises(fx.GraphError, match="make one with peft_fx.reserve"):
        fx.switch(both, "a")
    with pytest.raises(fx.GraphError, match="at least the number of resident adapters, 2"):
        fx.reserve(both, slots=1)
    with pytest.raises(fx.GraphError, match="apply or load one first"):
        fx.reserve(c.captured("wide"), slots=1)
    reserved = fx.reserve(both, slots=2)
    with pytest.raises(fx.GraphError, match="there is no adapter 'x'; resident: a, b"):
        fx.switch(reserved, "x")
    with pytest.raises(fx.GraphError, match="expected 1 numbers"):
        fx.switch(reserved, "b", weights=[1, 2])
    with pytest.raises(fx.HotswapError, match="no slot is free for adapter 'c'; taken: a, b"):
        fx.hotswap(reserved, tmp_path / "a", "c")
    assert c.error(c.run(reserved, "wide"), alone["a"]) <= TOLERANCE
    fx.switch(reserved, "a", weights=[0.5])
    with pytest.raises(fx.MergeError, match="acts with weight 0.5"):
        fx.merge(reserved)
