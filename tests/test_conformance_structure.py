"""What LoRA's graphs, merges and refusals are like, whatever the numbers: forms, sizes, dtypes, ties, exactness, errors."""

import conformance as c
import pytest
import torch
from marks import quick
from peft_fx.passes.inject.inject import tag_of, tagged
from peft_fx.passes.match.operators import schema_name
from torch import nn

import peft_fx as fx

EXPERTS = {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
LAYER = {"target_modules": ["layer"]}


def adapted(name, dtype=torch.float32, adapter="default", base=None, lowering="auto", **options):
    """A subject with one randomised adapter."""
    config = fx.LoraConfig(**{"r": 2, "init_lora_weights": False, **options})
    gm = fx.apply(base or c.captured(name, dtype), config, adapter_name=adapter, lowering=lowering)
    torch.manual_seed(5)
    with torch.no_grad():
        for n, p in gm.named_parameters():
            if p.requires_grad and f".{adapter}." in n:
                p.add_(0.1 * torch.randn_like(p))
    return gm


def inserted(gm):
    """(node, value) of every tensor that our nodes compute; a parameter's own get_attr and views of it are not computed."""
    nodes = [n for n in tagged(gm) if n.op == "call_function" and isinstance(n.meta.get("val"), torch.Tensor)]
    return [(n, n.meta["val"]) for n in nodes]


def bits(gm):
    return {k: v.clone() for k, v in gm.state_dict().items()}


def same_bits(before, after):
    assert before.keys() == after.keys(), sorted(before.keys() ^ after.keys())
    return [k for k in before if not torch.equal(before[k], after[k])] == []


# Forms


@pytest.mark.parametrize("name", quick(("mixtral", "mixtral_batched"), "mixtral"))
def test_no_node_has_the_size_of_the_experts_update(name):
    gm = adapted(name, lowering="activation", **EXPERTS)
    experts = [p.shape for n, p in c.build(name).named_parameters() if "experts" in n]
    smallest = min(s.numel() for s in experts)
    assert all(x.lowering == "activation" for x in fx.explain(gm).rows)
    big = [n for n, v in inserted(gm) if v.dim() == 3 and tuple(v.shape) in [tuple(s) for s in experts]]
    big += [n for n, v in inserted(gm) if isinstance(v.numel(), int) and v.numel() >= smallest]
    assert not big, big


LOW_PRECISION = [("linear", LAYER), ("Conv1D", LAYER), ("conv2d", LAYER), ("embedding", LAYER), ("llama", {"target_modules": "all-linear"}),
                 ("mixtral", EXPERTS)]  # fmt: skip


@pytest.mark.parametrize(
    "name, options", quick(LOW_PRECISION, "linear", "Conv1D", "conv2d", "embedding"), ids=[x[0] for x in LOW_PRECISION]
)
def test_a_bf16_base_gets_no_fp32_activation_but_casts_of_the_factors(name, options):
    gm = adapted(name, torch.bfloat16, lowering="activation", **options)
    wide = [(n, v) for n, v in inserted(gm) if v.dtype == torch.float32]
    assert all(all(isinstance(s, int) for s in v.shape) for _, v in wide), "an fp32 tensor has a batch axis"
    factors = {p.numel() for n, p in gm.named_parameters() if "lora_" in n}
    assert all(v.numel() in factors | {1} for _, v in wide)


def test_every_kind_that_an_operator_recognises_has_the_activation_form():
    for name in (
        "linear",
        "Conv1D",
        "conv1d",
        "conv2d_same",
        "conv2d_circular",
        "conv2d_grouped",
        "conv3d",
        "embedding",
    ):
        (row,) = fx.explain(adapted(name, lowering="activation", **{**LAYER, "r": 4})).rows
        assert row.lowering == "activation", (name, row.reason)


def test_a_module_called_twice_is_one_target_with_two_sites():
    gm = adapted("twice", target_modules=["shared"], lowering="activation")
    assert len(fx.explain(gm).rows) == 1
    assert sum(tag_of(n).get("role") == "result" for n in gm.graph.nodes) == 2


def test_dropout_acts_in_training_only_and_scales_what_it_keeps():
    """The mask is read off the graph's own dropout node; given that mask, the output is W x + s B A (mask x)."""
    gm = adapted("linear", **LAYER, lora_dropout=0.5).train()
    (dropout,) = [n for n in gm.graph.nodes if schema_name(n) == "aten::dropout"]

    class Recorder(torch.fx.Interpreter):
        def run_node(self, node):
            result = super().run_node(node)
            if node is dropout:
                self.kept = result
            return result

    x = c.inputs("linear")["x"]
    recorder = Recorder(gm)
    y = recorder.run(x)
    y = y[0] if isinstance(y, (tuple, list)) else y
    assert set(recorder.kept.div(x).round(decimals=4).unique().tolist()) == {0.0, 2.0}
    tensors = {n.rpartition(".")[2]: p for n, p in gm.named_parameters() if "lora_" in n}
    layer = c.build("linear").layer
    expected = layer(x) + 4 * recorder.kept @ tensors["lora_A"].t() @ tensors["lora_B"].t()
    assert c.error([y.detach()], [expected.detach()]) < 1e-5
    assert gm.eval() is gm and torch.equal(gm(x=x), gm(x=x))


# Refusals

REFUSED = [
    ("attention_cross", {"target_modules": ["attn"], "lora_dropout": 0.1}, "in_proj_weight.*dropout 0.1.*form at the operator.*split"),
    ("conv2d_grouped", {**LAYER, "r": 3}, "layer.weight.*r=3 is not divisible by groups=2; nearest valid: 2"),
    ("embedding", {**LAYER, "lora_bias": True}, "layer.weight.*lora_bias"),
    ("llama", {"target_modules": ["norm"]}, "norm.*modules_to_save"),
]  # fmt: skip


@pytest.mark.parametrize("name, options, message", REFUSED, ids=[x[0] for x in REFUSED])
def test_what_cannot_be_adapted_is_refused_with_a_reason(name, options, message):
    before = bits(c.captured(name))
    with pytest.raises(fx.RecipeError, match=f"(?s){message}"):
        fx.apply(c.captured(name), fx.LoraConfig(**{"r": 2, **options}))
    assert same_bits(before, bits(c.captured(name)))


# Merge and unmerge

KINDS = [
    ("linear", LAYER), ("linear_without_bias", {**LAYER, "lora_bias": True}), ("Conv1D", LAYER), ("conv1d", LAYER),
    ("conv2d_grouped", {**LAYER, "lora_bias": True}), ("conv3d", LAYER), ("embedding", LAYER), ("attention", {"target_modules": ["attn"]}),
    ("llama", {"target_modules": "all-linear", "modules_to_save": ["lm_head"]}), ("mixtral", EXPERTS),
    ("tied_llama", {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}),
    ("tied_llama", {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]}),
    ("biased_llama", {"target_modules": ["q_proj"], "bias": "all"}),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("keep", ["device", "cpu"])
@pytest.mark.parametrize("name, options", KINDS, ids=[x[0] for x in KINDS])
def test_merging_and_unmerging_in_bf16_changes_no_bit(name, options, keep):
    gm = adapted(name, torch.bfloat16, **options)
    before, output = bits(gm), c.run(gm, name, torch.bfloat16)
    merged = fx.merge(gm, keep_base=keep)
    assert not same_bits(
        {k: before[k] for k in c.build(name).state_dict()},
        {k: merged.state_dict()[k] for k in c.build(name).state_dict()},
    )
    assert same_bits(before, bits(gm)), "merge must not change its input"
    again = fx.unmerge(merged)
    assert same_bits(before, bits(again))
    assert all(torch.equal(a, b) for a, b in zip(output, c.run(again, name, torch.bfloat16), strict=True))
    assert [n for n, p in again.named_parameters() if p.requires_grad] == [
        n for n, p in gm.named_parameters() if p.requires_grad
    ]


def test_a_merge_that_keeps_nothing_cannot_be_undone():
    merged = fx.merge(adapted("linear", **LAYER), keep_base=None)
    assert not [n for n, _ in merged.named_buffers() if "replaced" in n]
    with pytest.raises(fx.MergeError, match="layer.weight: the replaced weight was not kept"):
        fx.unmerge(merged)


@pytest.mark.parametrize("name, value", [("linear", float("nan")), ("conv2d", float("inf"))])
def test_a_merge_with_numbers_that_are_not_finite_names_the_target_and_changes_nothing(name, value):
    gm = adapted(name, **LAYER)
    with torch.no_grad():
        next(p for n, p in gm.named_parameters() if "lora_B" in n).view(-1)[0] = value
    before = bits(gm)
    with pytest.raises(fx.MergeError, match="layer.weight: merging default gives inf or nan"):
        fx.merge(gm)
    assert all(torch.equal(a, b) or a.isnan().any() for a, b in zip(before.values(), bits(gm).values(), strict=True))
    assert fx.merge(gm, check_finite=False).state_dict()["layer.weight"].isfinite().all().logical_not()


def test_a_merge_checks_the_bias_too():
    gm = adapted("linear", **LAYER, lora_bias=True)
    with torch.no_grad():
        next(p for n, p in gm.named_parameters() if "lora_B_bias" in n)[0] = float("inf")
    with pytest.raises(fx.MergeError, match="layer.bias: merging default gives inf or nan"):
        fx.merge(gm)


def test_a_merge_that_overflows_the_weight_s_dtype_is_refused():
    gm = adapted("linear", torch.float16, **LAYER)
    with torch.no_grad():
        next(p for n, p in gm.named_parameters() if "lora_B" in n).fill_(1e6)
    with pytest.raises(fx.MergeError, match="inf or nan in torch.float16"):
        fx.merge(gm)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_merging_into_one_of_two_tied_weights_is_refused_unless_they_are_untied(target):
    gm = adapted("tied_llama", target_modules=[target])
    with pytest.raises(fx.MergeError, match=f"{target}.weight: refused: the weight is tied to .*pass untie=True"):
        fx.merge(gm)
    merged = fx.merge(gm, untie=True)
    assert c.error(c.run(merged, "tied_llama"), c.run(gm, "tied_llama")) < 1e-5
    state = merged.state_dict()
    assert not torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])
    again = fx.unmerge(merged)
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_a_module_under_two_names_stays_one_module():
    gm = adapted("alias", target_modules=["second"])
    assert len(fx.explain(gm).rows) == 1
    for graph in (gm, fx.merge(gm), fx.unmerge(fx.merge(gm))):
        assert graph.first is graph.second
        assert torch.equal(graph.state_dict()["first.weight"], graph.state_dict()["second.weight"])


def test_merging_into_both_tied_weights_alike_keeps_the_tie():
    gm = adapted("tied_llama", target_modules=["embed_tokens"], ensure_weight_tying=True)
    merged = fx.merge(gm)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert c.error(c.run(merged, "tied_llama"), c.run(gm, "tied_llama")) < 1e-5


SUBSETS = [
    ("linear", LAYER, {**LAYER, "lora_bias": True}),
    ("linear_without_bias", {**LAYER, "lora_bias": True}, {**LAYER, "lora_bias": True}),
    ("conv2d_grouped", LAYER, LAYER),
    ("conv2d_grouped", {**LAYER, "lora_bias": True}, {**LAYER, "r": 4}),
    ("llama", {"target_modules": ["q_proj", "embed_tokens"]}, {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["lm_head"]}),
    ("mixtral", EXPERTS, EXPERTS),
    ("attention_cross", {"target_modules": ["attn"]}, {"target_modules": ["attn"]}),
    ("attention_cross_without_bias", {"target_modules": ["attn"], "lora_bias": True}, {"target_modules": ["attn"], "lora_bias": True}),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name, first, second", SUBSETS, ids=[x[0] for x in SUBSETS])
def test_merging_some_adapters_leaves_the_others_active(name, first, second):
    gm = adapted(name, adapter="second", base=adapted(name, adapter="first", **first), **second)
    before, output = bits(gm), c.run(gm, name)
    for names in ("first", "second", ["second", "first"], None):
        merged = fx.merge(gm, names)
        assert c.error(c.run(merged, name), output) < 1e-5
        assert same_bits(before, bits(fx.unmerge(merged)))
    inactive = fx.set_adapter(gm, "first")
    alone = c.run(inactive, name)
    assert c.error(c.run(fx.merge(inactive), name), alone) < 1e-5
    assert c.error(c.run(fx.merge(fx.delete_adapter(gm, "second")), name), alone) < 1e-5


def test_two_adapters_that_bring_whole_modules_cannot_both_be_active():
    gm = adapted("llama", target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(fx.RecipeError, match="lm_head"):
        adapted("llama", adapter="other", base=gm, target_modules=["q_proj"], modules_to_save=["lm_head"])
    tokens = adapted("llama", target_modules=["q_proj"], trainable_token_indices=[3, 1])
    with pytest.raises(fx.RecipeError, match="embed_tokens.weight: refused: adapters 'default' and 'other'"):
        adapted("llama", adapter="other", base=tokens, target_modules=["q_proj"], trainable_token_indices=[1])
    both = adapted("llama", adapter="other", base=tokens, target_modules=["q_proj"], trainable_token_indices=[2])
    assert c.error(c.run(fx.merge(both), "llama"), c.run(both, "llama")) < 1e-5


def test_a_merged_copy_of_a_module_shares_no_memory_with_the_adapter():
    gm = adapted("llama", target_modules=["q_proj"], modules_to_save=["lm_head"])
    merged = fx.merge(gm)
    with torch.no_grad():
        merged.lm_head.weight.zero_()
    assert gm.get_parameter("peft_fx.adapters.default.lm_head.on_weight.weight").abs().sum() > 0


def test_parameters_of_the_user_s_model_are_never_touched():
    model = c.build("linear")
    before = {n: (p, p.requires_grad, p.detach().clone()) for n, p in model.named_parameters()}
    gm = fx.apply(fx.capture(model, kwargs=c.inputs("linear")), fx.LoraConfig(r=2, init_lora_weights=False, **LAYER))
    fx.unmerge(fx.merge(gm))
    c.loss([gm(**c.inputs("linear"))]).backward()
    for n, p in model.named_parameters():
        assert p is before[n][0] and p.requires_grad == before[n][1] and torch.equal(p, before[n][2]) and p.grad is None


class Raw(nn.Module):
    """Readers that only the weight form can serve: one parameter read twice, once in pieces."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Module()
        self.inner.w = nn.Parameter(torch.randn(6, 4))

    def forward(self, x):
        first, second = self.inner.w.split([2, 4])
        return x @ first.t() @ first + (x @ self.inner.w.t())[..., :4] + second.sum()


def test_a_parameter_read_in_pieces_takes_the_weight_form():
    model, x = Raw(), torch.randn(3, 4)
    gm = fx.apply(
        fx.capture(model, args=(x,)),
        fx.LoraConfig(r=2, target_modules=[], target_parameters=["inner.w"], init_lora_weights=False),
    )
    (row,) = fx.explain(gm).rows
    assert row.lowering == "weight" and "split" in row.reason
    tensors = {n.rpartition(".")[2]: p for n, p in gm.named_parameters() if "lora_" in n}
    model.inner.w = nn.Parameter(model.inner.w + 4 * tensors["lora_B"] @ tensors["lora_A"])
    assert c.error([gm(x).detach()], [model(x).detach()]) < 1e-5
    assert c.error([fx.merge(gm)(x).detach()], [model(x).detach()]) < 1e-5
