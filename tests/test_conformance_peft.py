"""LoRA against PEFT as oracle: outputs, gradients of every tensor, merged outputs, files both ways.

Where PEFT is wrong or refuses, test_conformance_definition.py has the case: conv dilation (PEFT crashes), padding modes
other than zeros (its branch pads with zeros), groups (it cannot merge), max_norm (its merge renormalises W + delta, its
forward W alone), MultiheadAttention's output projection (see there), lora_bias without a base bias (it cannot merge).
"""

import conformance as c
import peft
import pytest
import torch

import peft_fx as fx

TOLERANCE = 1e-5
LAYER = {"target_modules": ["layer"]}
FACTORS = {"init_lora_weights": False}
LLAMA = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

# subject, options of LoraConfig besides r=2; every trained tensor is randomised
CASES = [
    ("linear", LAYER),
    ("linear", {**LAYER, "lora_bias": True, "lora_alpha": 3}),
    ("linear", {**LAYER, "bias": "all"}),
    ("linear_without_bias", LAYER),
    ("Conv1D", LAYER),
    ("Conv1D", {**LAYER, "fan_in_fan_out": True, "lora_bias": True}),
    ("conv1d", LAYER),
    ("conv2d", {**LAYER, "lora_bias": True}),
    ("conv2d_options", LAYER),
    ("conv2d_same", LAYER),
    ("conv2d_without_bias", LAYER),
    ("conv3d", {**LAYER, "use_rslora": True}),
    ("embedding", LAYER),
    ("embedding_padded", {**LAYER, "lora_alpha": 5}),
    ("embedding_by_frequency", LAYER),
    ("twice", {"target_modules": ["shared", "last"]}),
    ("llama", {}),
    ("llama", {**LLAMA, "lora_alpha": 5, "use_rslora": True}),
    ("llama", {"target_modules": "all-linear", "rank_pattern": {"q_proj": 4, r"layers\.1\.mlp.*": 1}, "alpha_pattern": {"up_proj": 3}}),
    ("llama", {**LLAMA, "use_rslora": True, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"layers.0.self_attn.q_proj": 5}}),
    ("llama", {**LLAMA, "lora_bias": True, "bias": "lora_only"}),
    ("llama", {**LLAMA, "modules_to_save": ["lm_head", "norm"]}),
    ("llama", {**LLAMA, "layers_to_transform": [1], "layers_pattern": "layers"}),
    ("llama", {**LLAMA, "init_lora_weights": "gaussian"}),
    ("llama", {"target_modules": ["embed_tokens", "lm_head"]}),
    ("llama", {**LLAMA, "trainable_token_indices": [3, 1]}),
    ("llama", {**LLAMA, "trainable_token_indices": {"embed_tokens": [3, 1], "lm_head": [0, 2, 4]}}),
    ("biased_llama", {**LLAMA, "bias": "all"}),
    ("biased_llama", {**LLAMA, "bias": "lora_only", "target_modules": ["q_proj", "v_proj"], "lora_bias": True}),
    ("tied_llama", {**LLAMA, "trainable_token_indices": [3, 1]}),
    ("tied_llama", {**LLAMA, "trainable_token_indices": {"embed_tokens": [3, 1], "lm_head": [3, 1]}}),
    ("tied_llama", {**LLAMA, "trainable_token_indices": {"embed_tokens": [3, 1], "lm_head": [3, 2]}}),
    ("tied_llama", {**LLAMA, "modules_to_save": ["embed_tokens"]}),
    ("tied_llama", {**LLAMA, "modules_to_save": ["lm_head"], "ensure_weight_tying": True}),
    ("tied_llama", {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}),
    ("tied_llama", {"target_modules": ["embed_tokens"]}),
    ("gpt2", {}),
    ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc", "wte"], "bias": "lora_only"}),
    ("bert", {"task_type": "SEQ_CLS", "bias": "all", "target_modules": "all-linear"}),
    ("bert", {"target_modules": ["query", "word_embeddings", "dense"], "modules_to_save": ["LayerNorm"]}),
    ("t5", {"target_modules": ["q", "v", "wi", "wo"]}),
    ("vit", {"target_modules": ["projection", "q_proj", "v_proj", "query", "value", "dense"], "modules_to_save": ["classifier"]}),
    ("mixtral", {"target_modules": [], "target_parameters": EXPERTS}),
    ("mixtral", {"target_modules": ["q_proj"], "target_parameters": [EXPERTS[1], "mlp.gate.weight"], "rank_pattern": {"experts.down_proj": 4}}),
    ("mixtral_batched", {"target_modules": [], "target_parameters": EXPERTS}),
]  # fmt: skip
# PEFT cannot merge these, or merges them wrongly: the definition has them
NO_MERGE = {"linear_without_bias"}


def label(case):
    name, options = case
    return name + "".join(f"-{k}={v}" for k, v in options.items() if case[1] is not LAYER)[:90]


@pytest.fixture(scope="module", params=CASES, ids=map(label, CASES))
def case(request, tmp_path_factory):
    """(subject, PEFT's model, our graph over the same weights, loaded from PEFT's file)."""
    name, options = request.param
    theirs = c.peft_model(name, {"r": 2, **options})
    folder = c.save_peft(theirs, tmp_path_factory.mktemp("peft"))
    return name, options, theirs, fx.load_adapter(c.captured(name), folder, trainable=True)


def test_outputs_agree(case):
    name, _, theirs, ours = case
    assert c.error(c.run(ours, name), c.run(theirs, name)) <= TOLERANCE
    assert c.error(c.run(ours, name), c.run(c.build(name), name)) > 1e-3, "the adapter does nothing"


def test_gradients_of_every_tensor_agree(case):
    name, _, theirs, ours = case
    expected = c.gradients(theirs, name, lambda folder: c.save_peft(theirs, folder))
    assert c.error(c.gradients(ours, name, lambda folder: fx.save_adapter(ours, folder)), expected) <= TOLERANCE


def test_our_file_is_peft_s_file_and_peft_reads_it(case, tmp_path):
    name, _, theirs, ours = case
    fx.save_adapter(ours, tmp_path)
    expected = c.saved(lambda folder: c.save_peft(theirs, folder))
    assert c.error(c.saved(lambda folder: fx.save_adapter(ours, folder)), expected) == 0
    again = c.quiet(peft.PeftModel.from_pretrained, c.build(name), tmp_path).eval()
    assert c.error(c.run(again, name), c.run(theirs, name)) <= TOLERANCE


def test_merged_outputs_and_weights_agree(case):
    name, options, theirs, ours = case
    merged = fx.merge(ours, untie=True)
    assert c.error(c.run(merged, name), c.run(theirs, name)) <= TOLERANCE
    assert merged.state_dict().keys() == c.build(name).state_dict().keys()
