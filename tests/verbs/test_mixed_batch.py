"""One batch, an adapter per row: as each row alone, as PEFT's mixed batch, and nothing recompiled."""

import conformance as c
import peft
import pytest
import tiny
import torch
from torch import nn

import peft_fx as fx

pytestmark = pytest.mark.slow

LAYER = {"target_modules": ["layer"]}
LORA = {"peft_type": "LORA", "r": 4, "init_lora_weights": False, **LAYER}
CASES = [
    ("wide", LORA),
    ("wide", {**LORA, "lora_bias": True}),
    ("wide", {**LORA, "use_dora": True}),
    ("wide", {"peft_type": "OFT", "oft_block_size": 4, **LAYER}),
    ("wide", {"peft_type": "BOFT", "boft_block_size": 4, **LAYER}),
    ("wide", {"peft_type": "IA3", "feedforward_modules": ["layer"], **LAYER}),
    ("wide", {"peft_type": "MISS", "r": 2, **LAYER}),
    ("wide_conv2d", {"peft_type": "IA3", "feedforward_modules": [], **LAYER}),
    ("wide_conv1d", LORA),
    ("wide_conv2d", LORA),
    ("wide_conv2d_grouped", {**LORA, "lora_bias": True}),
    ("wide_embedding", LORA),
    ("twice", {**LORA, "target_modules": ["shared", "last"]}),
    ("gpt2", {**LORA, "target_modules": ["c_attn", "c_fc", "c_proj", "wte"]}),
    ("llama", {**LORA, "target_modules": "all-linear"}),
    ("mixtral", {**LORA, "target_modules": ["q_proj", "gate"]}),
]
ALL = pytest.mark.parametrize("subject, config", CASES, ids=lambda v: v if isinstance(v, str) else v["peft_type"])
MIXES = ([0, 1, -1, 1, 0, 0], [-1] * 6, [1, 1, 1, 0, -1, 0])


def rows(subject):
    """Six rows: the subject's three and again the same in another order."""
    return {k: torch.cat([v, v.flip(0)]) for k, v in c.inputs(subject).items()}


def two(subject, config, **other):
    """A graph with adapters a and b resident; `other`: what differs in b's config."""
    tuned = fx.apply(fx.apply(c.captured(subject), config, "a"), {**config, **other}, "b")
    c.randomise(tuned)
    return tuned


def alone(tuned, subject, **options):
    """What adapters a and b, and at position -1 the base, give for every row."""
    with torch.no_grad():
        graphs = [fx.set_adapter(tuned, name) for name in "ab"] + [c.captured(subject)]
        return [by_rows(graph(**rows(subject)), 6) for graph in graphs]


def by_rows(output, count):
    return [t for t in c.floats(output) if t.dim() and len(t) == count]


def chosen(results, mix):
    return [torch.stack([results[i][n][row] for row, i in enumerate(mix)]) for n in range(len(results[0]))]


def mixed(graph, subject, mix):
    with torch.no_grad():
        return by_rows(graph(**rows(subject), adapter_ids=torch.tensor(mix)), len(mix))


@ALL
def test_every_row_is_as_with_its_adapter_alone_and_rows_of_the_base_change_no_bit(subject, config):
    tuned = two(subject, config)
    graph, results = fx.mixed_batch(tuned, ["a", "b"]), alone(tuned, subject)
    for mix in MIXES:
        assert c.error(mixed(graph, subject, mix), chosen(results, mix)) <= 1e-5
    assert all(map(torch.equal, mixed(graph, subject, MIXES[1]), chosen(results, MIXES[1])))


@ALL
def test_gradients_are_those_of_each_row_alone(subject, config):
    tuned = two(subject, config)
    graph, mix = fx.mixed_batch(tuned), MIXES[0]

    def gradients(*losses):
        names = [n for n, p in tuned.named_parameters() if p.requires_grad]
        tuned.zero_grad()
        sum(losses).backward()
        return {
            n: torch.zeros_like(p) if p.grad is None else p.grad.clone()
            for n, p in tuned.named_parameters()
            if n in names
        }

    def loss(output, of):
        generator = torch.Generator().manual_seed(2)
        weights = (torch.randn(t.shape, generator=generator) for t in output)
        return sum((t * w)[[i in of for i in mix]].sum() for t, w in zip(output, weights, strict=True))

    found = gradients(loss(by_rows(graph(**rows(subject), adapter_ids=torch.tensor(mix)), 6), (0, 1, -1)))
    single = [by_rows(fx.set_adapter(tuned, name)(**rows(subject)), 6) for name in "ab"]
    assert c.error(found, gradients(*(loss(output, [i]) for i, output in enumerate(single)))) <= 1e-5


@ALL
def test_another_mix_another_batch_and_a_hotswap_recompile_nothing(subject, config, tmp_path):
    tuned = two(subject, config)
    other = two(subject, config)
    c.randomise(other, 8)
    fx.save_adapter(other, tmp_path, "b")
    compiled = torch.compile(fx.mixed_batch(tuned), fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():  # five rows: a size that no other axis has
        compiled(**{k: v[:5].clone() for k, v in rows(subject).items()}, adapter_ids=torch.tensor(MIXES[0][:5]))
    with torch.compiler.set_stance("fail_on_recompile"):
        for mix in MIXES:
            assert c.error(mixed(compiled, subject, mix), chosen(alone(tuned, subject), mix)) <= 1e-5
        fx.hotswap(compiled, tmp_path, "b")
        assert c.error(mixed(compiled, subject, MIXES[0]), chosen(alone(tuned, subject), MIXES[0])) <= 1e-5
        few = {k: v[:4].clone() for k, v in rows(subject).items()}
        with torch.no_grad():
            compiled(**few, adapter_ids=torch.tensor([1, -1, 0, 0]))


@pytest.mark.parametrize("subject, config", [CASES[i] for i in (0, 3, 9, 11, 14)])
def test_exported_it_is_the_same_and_a_loaded_graph_has_its_base(subject, config, tmp_path):
    tuned = two(subject, config)
    graph = fx.mixed_batch(tuned)
    expected = mixed(graph, subject, MIXES[0])
    program = fx.export(graph, tmp_path / "graph.pt2")
    assert c.error(mixed(program.module(check_guards=False), subject, MIXES[0]), expected) == 0
    again = torch.export.export(graph, (), {**rows(subject), "adapter_ids": torch.tensor(MIXES[0])}, strict=False)
    assert c.error(mixed(again.module(), subject, MIXES[2]), mixed(graph, subject, MIXES[2])) == 0
    loaded = fx.load(tmp_path / "graph.pt2")
    assert c.error(mixed(loaded, subject, MIXES[0]), expected) == 0
    fx.save_adapter(tuned, tmp_path / "b", "b")
    fx.hotswap(loaded, tmp_path / "b", "a")
    assert c.error(mixed(loaded, subject, [0] * 6), mixed(graph, subject, [1] * 6)) <= 1e-6
    base = loaded.meta["peft_fx"].base.graph
    assert [n.name for n in base.find_nodes(op="placeholder")] == list(rows(subject))


@pytest.mark.parametrize(
    "subject, targets", [("llama", "all-linear"), ("gpt2", ["c_attn", "wte"]), ("wide_conv2d", ["layer"])]
)
def test_it_agrees_with_pefts_mixed_batch(subject, targets, tmp_path):
    configs = [peft.LoraConfig(r=r, lora_alpha=3, target_modules=targets, init_lora_weights=False) for r in (2, 4)]
    theirs = c.quiet(peft.get_peft_model, c.build(subject), configs[0], "a")
    c.quiet(theirs.add_adapter, "b", configs[1])
    theirs.eval()
    graph = c.captured(subject)
    for name in "ab":
        graph = fx.load_adapter(graph, c.save_peft(theirs, tmp_path, name), name)
    graph = fx.mixed_batch(graph)
    for mix in MIXES:
        names = [("a", "b", "__base__")[i] for i in mix]
        with torch.no_grad():
            expected = by_rows(theirs(**rows(subject), adapter_names=names), 6)
        assert c.error(mixed(graph, subject, mix)[:1], expected[:1]) <= 1e-5


def test_it_is_outlined_like_any_graph():
    tuned = two("llama", {**LORA, "target_modules": "all-linear"})
    graph = fx.mixed_batch(tuned)
    expected = mixed(graph, "llama", MIXES[0])
    assert c.error(mixed(fx.outline(graph), "llama", MIXES[0]), expected) == 0
    assert c.error(mixed(fx.inline(fx.outline(graph)), "llama", MIXES[0]), expected) == 0


def test_adapters_may_differ_in_rank_targets_and_method():
    tuned = fx.apply(c.captured("llama"), {**LORA, "target_modules": ["q_proj", "v_proj"]}, "a")
    tuned = fx.apply(tuned, {**LORA, "r": 2, "target_modules": ["q_proj", "down_proj"]}, "b")
    oft = {"peft_type": "OFT", "oft_block_size": 4, "target_modules": ["q_proj"]}
    tuned = fx.apply(tuned, oft, "c")
    c.randomise(tuned)
    graph = fx.mixed_batch(tuned, ["b", "c", "a"])
    with torch.no_grad():
        results = [by_rows(fx.set_adapter(tuned, name)(**rows("llama")), 6) for name in "bca"]
        results.append(by_rows(c.captured("llama")(**rows("llama")), 6))
    mix = [2, 0, 1, -1, 0, 2]
    assert c.error(mixed(graph, "llama", mix), chosen(results, mix)) <= 1e-5


def test_dropout_follows_the_mode_and_each_rows_adapter():
    model = nn.Sequential(nn.Linear(8, 8, bias=False)).eval()
    base = fx.capture(model, args=(torch.randn(4, 3, 8),))
    config = {**LORA, "target_modules": ["0"]}
    tuned = fx.apply(fx.apply(base, {**config, "lora_dropout": 0.5}, "a"), config, "b")
    graph = fx.mixed_batch(tuned)
    x, ids = torch.randn(4, 3, 8), torch.tensor([0, 1, 0, -1])
    still = graph(x, adapter_ids=ids)
    assert torch.equal(still, graph(x, adapter_ids=ids))
    graph.train()
    moved = (graph(x, adapter_ids=ids) != still).flatten(1).any(1)
    assert moved.tolist() == [True, False, True, False]


def test_slots_are_chosen_by_name_and_filled_later(tmp_path):
    tuned = two("wide", LORA)
    fx.save_adapter(tuned, tmp_path / "b", "b")
    reserved = fx.reserve(fx.set_adapter(tuned, "a"), slots=3)
    fx.hotswap(reserved, tmp_path / "b", "new")
    graph = fx.mixed_batch(reserved, ["new", "a"])
    results = alone(tuned, "wide")
    assert c.error(mixed(graph, "wide", [1, 0, -1] * 2), chosen(results, [0, 1, -1] * 2)) <= 1e-6


class Second(nn.Module):
    """Rows on the second axis, then merged with the first, as MultiheadAttention has them."""

    def __init__(self):
        super().__init__()
        self.layer, self.out = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        h = self.layer(x.transpose(0, 1))
        return self.out(h.reshape(-1, 8)).view(h.shape).transpose(0, 1)


class Shuffled(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        flat = x.reshape(-1, 8)
        return self.layer(flat.flip(0)).view(x.shape)


def test_rows_are_found_on_other_axes_and_in_merged_ones():
    x = torch.randn(4, 3, 8)
    base = fx.capture(Second().eval(), args=(x,))
    tuned = fx.apply(base, {**LORA, "target_modules": ["layer", "out"]})
    with torch.no_grad():
        found = fx.mixed_batch(tuned)(x, adapter_ids=torch.tensor([0, -1, 0, -1]))
        expected = torch.stack([tuned(x)[0], base(x)[1], tuned(x)[2], base(x)[3]])
    assert c.error([found], [expected]) <= 1e-6


REFUSED = [
    ("wide", {"peft_type": "HIRA", "r": 2, **LAYER}, "layer.weight: adapter 'default' refused.* HIRA rewrites the weight"),
    ("mixtral", {**LORA, "target_modules": [], "target_parameters": ["mlp.experts.down_proj"]},
     r"experts\.down_proj: .* an order of their own"),
    ("wide_conv2d", {"peft_type": "OFT", "oft_block_size": 4, **LAYER}, "OFT has only the weight form on conv2d"),
    ("attention", {**LORA, "target_modules": ["attn"]}, "attn.out_proj.weight: .* are no axis"),
    ("t5", {**LORA, "target_modules": ["relative_attention_bias"]}, "are no axis"),
    ("embedding_max_norm", LORA, "the weight form is shared by all rows"),
]  # fmt: skip


@pytest.mark.parametrize("subject, config, reason", REFUSED, ids=lambda v: v if isinstance(v, str) else v["peft_type"])
def test_what_cannot_act_row_by_row_is_refused_by_name(subject, config, reason):
    with pytest.raises(fx.GraphError, match=reason):
        fx.mixed_batch(fx.apply(c.captured(subject), config))


def test_shuffled_tokens_and_fixed_rows_are_refused():
    x, config = torch.randn(4, 3, 8), LORA
    with pytest.raises(fx.GraphError, match="are no axis"):
        fx.mixed_batch(fx.apply(fx.capture(Shuffled().eval(), args=(x,)), config))
    fixed = fx.capture(Shuffled().eval(), args=(x,), dynamic_shapes=None)
    with pytest.raises(fx.GraphError, match="fixed to 4 by capture"):
        fx.mixed_batch(fx.apply(fixed, config))


def test_ids_that_do_not_fit_and_misuse_are_refused():
    tuned = two("wide", LORA)
    graph, x = fx.mixed_batch(tuned), torch.randn(3, 4, 8)
    for ids, reason in (
        (torch.tensor([0, 1, 2]), "2 is no adapter; expected -1 for the base, 0: a, 1: b"),
        (torch.tensor([0, -2, 1]), "-2 is no adapter"),
        (torch.tensor([0, 1]), "one per row, 3 for this batch, given 2"),
        (torch.tensor([0.0, 1.0, 1.0]), r"expected a tensor of int64 \(rows,\), given torch.float32"),
        (torch.tensor([[0, 1, 1]]), r"given torch.int64 \[1, 3\]"),
        ([0, 1, 1], "given list"),
    ):
        with pytest.raises(fx.GraphError, match=reason):
            graph(x=x, adapter_ids=ids)
    program = fx.export(graph).module(check_guards=False)
    with pytest.raises(RuntimeError, match="expected -1 for the base, or 0 to 1"):
        program(x=x, adapter_ids=torch.tensor([0, 1, 2]))
    compiled = torch.compile(graph, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception) as caught:
        compiled(x=x, adapter_ids=torch.tensor([0, 1, 2]))
    assert "expected -1 for the base, or 0 to 1" in str(caught.value) + str(caught.value.__context__)
    with pytest.raises(fx.GraphError, match="use the graph that peft_fx.mixed_batch made it from"):
        fx.set_adapter(graph, "a")
    with pytest.raises(fx.MergeError, match="use the graph that peft_fx.mixed_batch made it from"):
        fx.merge(graph)
    with pytest.raises(fx.GraphError, match="there is no adapter 'x'; resident: a, b"):
        fx.mixed_batch(tuned, ["x"])
    with pytest.raises(fx.GraphError, match="expected a list of adapter names"):
        fx.mixed_batch(tuned, "a")
    with pytest.raises(fx.GraphError, match="at least one adapter"):
        fx.mixed_batch(c.captured("wide"))


def test_bfloat16_agrees_with_each_adapter_alone():
    model = tiny.build("llama").to(torch.bfloat16).eval()
    inputs = c.inputs("llama")
    base = fx.capture(model, kwargs=inputs)
    tuned = fx.apply(
        fx.apply(base, {**LORA, "target_modules": "all-linear"}, "a"), {**LORA, "target_modules": ["q_proj"]}, "b"
    )
    with torch.no_grad():
        results = [fx.set_adapter(tuned, name)(**inputs).logits.float() for name in "ab"]
        found = fx.mixed_batch(tuned)(**inputs, adapter_ids=torch.tensor([1, 0, 1])).logits.float()
    assert c.error([found], [torch.stack([results[1][0], results[0][1], results[1][2]])]) <= 0.03
