"""LoRA against its definition: the eager model in float64 with W + s B A in the weights' place, dense.

Every operator kind in both forms, and what PEFT gets wrong: dilation, padding modes, groups, max_norm, MultiheadAttention's
output projection, biases that the base lacks. The definition's update (conformance.dense_delta) is computed from PEFT's files
by other formulas than peft_fx uses; a grouped convolution is compared with an ungrouped one.

Not here: an embedding's scale_grad_by_freq. As in PEFT it scales the gradient of A alone, in the dense form that of B too.
"""

import math

import conformance as c
import pytest
import torch

import peft_fx as fx

TOLERANCE = 1e-5
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ATTENTION = {"attn": ("attn.in_proj_weight", "linear"), "attn.base_layer.out_proj": ("attn.out_proj.weight", "linear")}
MOE = "model.layers.0.mlp.experts"
# PEFT wraps a module once per parameter, the first one innermost
MIXTRAL = {f"{MOE}.base_layer": (f"{MOE}.gate_up_proj", "expert"), MOE: (f"{MOE}.down_proj", "expert")}


def layer(kind):
    return {"layer": ("layer.weight", kind)}


# subject, options besides r=4, file prefix -> (parameter, kind)
CASES = [
    ("linear", {}, layer("linear")),
    ("linear_without_bias", {"lora_bias": True}, layer("linear")),
    ("linear", {"lora_bias": True, "use_rslora": True, "lora_alpha": 3}, layer("linear")),
    ("linear", {"use_rslora": True, "r": 16, "alpha_pattern": {"layer": 5}}, layer("linear")),
    ("Conv1D", {"lora_bias": True}, layer("Conv1D")),
    ("conv1d", {}, layer("conv")),
    ("conv2d_options", {"lora_bias": True}, layer("conv")),
    ("conv2d_without_bias", {"lora_bias": True}, layer("conv")),
    ("conv2d_same", {}, layer("conv")),
    ("conv3d", {}, layer("conv")),
    ("conv3d_pointwise", {}, layer("conv")),
    ("conv1d_dilated", {}, layer("conv")),
    ("conv2d_dilated", {"lora_bias": True}, layer("conv")),
    ("conv2d_same_dilated", {}, layer("conv")),
    ("conv2d_circular", {}, layer("conv")),
    ("conv2d_reflect", {}, layer("conv")),
    ("conv1d_grouped", {}, layer("conv")),
    ("conv2d_grouped", {"lora_bias": True}, layer("conv")),
    ("conv2d_depthwise", {}, layer("conv")),
    ("conv3d_grouped", {}, layer("conv")),
    ("embedding", {}, layer("embedding")),
    ("embedding_padded", {}, layer("embedding")),
    ("embedding_max_norm", {}, layer("embedding")),
    ("attention", {"target_modules": ["attn"]}, ATTENTION),
    ("attention_without_bias", {"target_modules": ["attn"], "lora_bias": True}, ATTENTION),
    ("attention_cross", {"target_modules": ["attn"]}, ATTENTION),
    ("attention_cross", {"target_modules": ["attn"], "lora_bias": True}, ATTENTION),
    ("twice", {"target_modules": ["shared"]}, {"shared": ("shared.weight", "linear")}),
    ("views", {"target_modules": [], "target_parameters": ["inner.out_in"]}, {"inner": ("inner.out_in", "linear")}),
    ("views", {"target_modules": [], "target_parameters": ["inner.in_out"]}, {"inner": ("inner.in_out", "linear")}),
    ("alias", {"target_modules": ["second"]}, {"first": ("first.weight", "linear")}),
    ("rows", {"target_modules": [], "target_parameters": ["inner.chosen"]}, {"inner": ("inner.chosen", "linear")}),
    ("rows", {"target_modules": [], "target_parameters": ["inner.second"]}, {"inner": ("inner.second", "expert")}),
    ("rows", {"target_modules": [], "target_parameters": ["inner.first"]}, {"inner": ("inner.first", "expert")}),
    ("mixtral", {"target_modules": [], "target_parameters": EXPERTS}, MIXTRAL),
    ("mixtral_batched", {"target_modules": [], "target_parameters": EXPERTS}, MIXTRAL),
]  # fmt: skip


def label(case):
    name, options, _ = case
    return "-".join([name, *(f"{k}={v}" for k, v in options.items() if k != "target_modules")])


WEIGHT_ONLY = {
    "embedding_max_norm", "attention_cross", "attention_cross-lora_bias=True", "views-target_parameters=['inner.in_out']",
    "rows-target_parameters=['inner.chosen']", "rows-target_parameters=['inner.second']",
}  # fmt: skip
# (case, form)
CELLS = [
    (x, form) for form in ("activation", "weight") for x in CASES if form == "weight" or label(x) not in WEIGHT_ONLY
]


def adapted(case, form):
    """The subject with LoRA, and the options of that."""
    name, options, _ = case
    options = {"r": 4, "init_lora_weights": False, "target_modules": ["layer"], **options}
    torch.manual_seed(5)
    return fx.apply(c.captured(name), fx.LoraConfig(**options), lowering=form), options


@pytest.fixture(scope="module", params=CELLS, ids=[f"{form}-{label(x)}" for x, form in CELLS])
def case(request):
    """(subject, our graph, the definition over the same numbers)."""
    (name, _, parts), form = request.param
    ours, options = adapted(*request.param)
    assert {row.lowering for row in fx.explain(ours).rows} == {form}
    c.randomise(ours)
    alpha, r = options.get("alpha_pattern", {}).get("layer", options.get("lora_alpha", 8)), options["r"]
    scale = alpha / math.sqrt(r) if options.get("use_rslora") else alpha / r
    tensors = c.saved(lambda folder: fx.save_adapter(ours, folder))
    return name, ours, c.definition(name, tensors, {k: (*part, scale) for k, part in parts.items()})


@pytest.mark.parametrize("case", [x for x in CASES if label(x) in WEIGHT_ONLY], ids=label)
def test_what_no_operator_takes_has_the_weight_form_alone(case):
    with pytest.raises(fx.RecipeError, match="lowering='activation' was asked for, but"):
        adapted(case, "activation")


def test_outputs_and_gradients_agree(case):
    name, ours, definition = case
    assert c.error(c.run(ours, name), definition.run(name)) <= TOLERANCE
    gradients = c.gradients(ours, name, lambda folder: fx.save_adapter(ours, folder))
    assert c.error(gradients, definition.gradients(name)) <= TOLERANCE


def test_merged_outputs_and_weights_agree(case):
    name, ours, definition = case
    merged = fx.merge(ours)
    weights = {k: v.detach() for k, v in definition.weights().items()}
    found = {k: v.clone() for k, v in merged.state_dict().items() if k in weights}  # max_norm changes it when run
    assert c.error(found, weights) <= TOLERANCE
    assert c.error(c.run(merged, name), definition.run(name)) <= TOLERANCE


def test_unmerge_brings_every_bit_back(case):
    name, ours, _ = case
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    output = c.run(ours, name)
    for keep in ("device", "cpu"):
        again = fx.unmerge(fx.merge(ours, keep_base=keep))
        after = again.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[k], after[k]) for k in before)
        assert all(torch.equal(a, b) for a, b in zip(output, c.run(again, name), strict=True))
