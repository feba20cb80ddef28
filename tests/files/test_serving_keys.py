"""vLLM and SGLang load what we write: their rules as tables, read from their sources (vLLM 0.2x `vllm/lora/utils.py`,
`lora_model.py`, `peft_helper.py`, `model_manager.py`; SGLang `srt/lora/lora.py`, `lora_config.py`, `utils.py`, mid 2026).

The tests take the folder apart as these loaders do, and compare the updates that they get with merged weights.
"""

import json
import re

import peft
import pytest
import torch
import transformers
from graphs import captured, tuned
from safetensors.torch import load_file
from tiny import SMALL, build

import peft_fx
from peft_fx.errors import RecipeError
from peft_fx.hf.files.serving import save_for_serving

# Rules

# vLLM: the file's keys say what is adapted; what does not parse is an error
VLLM_KEY = re.compile(
    r"base_model\.model\.(?P<module>.+)\.(?:lora_(?P<side>[AB])\.weight|lora_embedding_(?P<of_ids>[AB]))"
)
# the base's own weights, which PEFT writes beside adapted embeddings and heads
SKIPPED = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # max_lora_rank: a file's r may be as large or smaller
VLLM_CONFIG = {
    "r": lambda v: isinstance(v, int) and 0 < v <= VLLM_RANKS[-1],
    "lora_alpha": lambda v: isinstance(v, (int, float)),
    "target_modules": lambda v: isinstance(v, (list, str)),  # must be there; its value is not read
    "bias": lambda v: v == "none",
    "modules_to_save": lambda v: not v,
    "use_dora": lambda v: v is False,
    "trainable_token_indices": lambda v: v is None,
    "use_rslora": lambda v: isinstance(v, bool),
    "rank_pattern": lambda v: not v,  # not read: every module gets lora_alpha / r
    "alpha_pattern": lambda v: not v,
}
# SGLang: target_modules names what is looked for in the keys, by last components
SGLANG_CONFIG = {
    "peft_type": lambda v: v.lower() == "lora",
    "r": VLLM_CONFIG["r"],
    "lora_alpha": VLLM_CONFIG["lora_alpha"],
    "target_modules": lambda v: isinstance(v, list) or v in ("all", "all-linear"),
    "use_dora": lambda v: v is False,
    "use_rslora": lambda v: v is False,  # not read: the scale is lora_alpha / r
    "rank_pattern": lambda v: not v,
    "alpha_pattern": lambda v: not v,
}
SGLANG_PACKED = {
    "q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj",
    "w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj",
}  # fmt: skip
SGLANG_MODULES = {"qkv_proj", "o_proj", "gate_up_proj", "down_proj", "embed_tokens", "lm_head"}
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
# architecture -> last components that vLLM expects, and its names of experts below `.experts`; a stack: read as one
VLLM_MODULES = {
    "tied_llama": ({*ATTENTION, *MLP, "embed_tokens", "lm_head"}, ()),
    "qwen3": ({*ATTENTION, *MLP, "embed_tokens", "lm_head"}, ()),
    "qwen3_moe": ({*ATTENTION, *MLP, "gate", "embed_tokens", "lm_head"}, MLP),
    "mixtral": ({*ATTENTION, "gate", "embed_tokens", "lm_head"}, ("w1", "w2", "w3")),
    "gpt_oss": ({*ATTENTION, "router", "embed_tokens", "lm_head"}, "a stack"),
}
EXPERTS = 4
STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def model_of(name):
    torch.manual_seed(0)
    small = {**SMALL, "num_hidden_layers": 1, "num_key_value_heads": 2, "head_dim": 8}
    routed = {**small, "num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
    if name == "qwen3":
        return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**small))
    if name == "qwen3_moe":
        return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**routed))
    if name == "gpt_oss":
        small |= {"num_local_experts": EXPERTS, "num_experts_per_tok": 2}
        return transformers.GptOssForCausalLM(transformers.GptOssConfig(**small, layer_types=["full_attention"]))
    return build(name)


def adapted(name, **config):
    torch.manual_seed(1)
    options = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, "task_type": "CAUSAL_LM", **config}
    return peft_fx.get_peft_model(model_of(name), peft_fx.LoraConfig(**options))


# What a loader makes of a folder


def read(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors = {key: tensor for key, tensor in tensors.items() if not key.endswith(SKIPPED)}
    return json.loads((folder / "adapter_config.json").read_text()), tensors


def faults(config, rules):
    return [f"{name}={config.get(name)!r}" for name, holds in rules.items() if not holds(config.get(name))]


def vllm_factors(folder, name):
    """Module -> {"A", "B"}. Asserts that vLLM takes every key, for a server with this model."""
    config, tensors = read(folder)
    assert faults(config, VLLM_CONFIG) == []
    modules, experts = VLLM_MODULES[name]
    found = {}
    for key, tensor in tensors.items():
        parsed = VLLM_KEY.fullmatch(key)
        assert parsed, f"{key} is unsupported LoRA weight"
        module = parsed["module"]
        found.setdefault(module, {})[parsed["side"] or parsed["of_ids"]] = tensor
        if ".experts" in module:
            own = module[module.find(".experts") + 1 :]
            allowed = {"experts", "experts.base_layer"}
            if experts != "a stack":
                allowed = {f"experts.{e}.{projection}" for e in range(EXPERTS) for projection in experts}
            assert own in allowed, own
        else:
            assert module.rpartition(".")[2] in modules, module
    assert all(set(pair) == {"A", "B"} for pair in found.values())
    return found, config["lora_alpha"] / config["r"] ** (0.5 if config["use_rslora"] else 1)


def vllm_updates(folder, name):
    """Parameter name -> its update, of the model as transformers has it, by vLLM's arithmetic."""
    factors, scale = vllm_factors(folder, name)
    updates = {}
    for module, pair in factors.items():
        A, B = pair["A"] * scale, pair["B"]
        if module.endswith((".experts", ".experts.base_layer")):  # a stack: expert-major rows of A, minor columns of B
            A, B = A.reshape(EXPERTS, -1, A.shape[-1]), B.reshape(B.shape[0], -1, EXPERTS).permute(2, 0, 1)
            stack = "down_proj" if module.endswith(".experts") else "gate_up_proj"
            updates[f"{module.removesuffix('.base_layer')}.{stack}"] = B @ A
        elif match := re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)", module):
            stack, expert, projection = match.groups()
            where = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}.get(projection, projection)
            updates.setdefault(stack.replace("block_sparse_moe", "mlp"), {})[int(expert), where] = B @ A
        else:
            updates[f"{module}.weight"] = (B @ A).mT if "embed_tokens" in module else B @ A
    for stack in [k for k, v in updates.items() if isinstance(v, dict)]:
        own = updates.pop(stack)
        halves = [torch.cat((own[e, "gate_proj"], own[e, "up_proj"])) for e in range(EXPERTS)]
        updates |= {f"{stack}.gate_up_proj": torch.stack(halves)}
        updates |= {f"{stack}.down_proj": torch.stack([own[e, "down_proj"] for e in range(EXPERTS)])}
    return updates


def sglang_accepts(folder):
    """Asserts that SGLang finds a buffer for every key, and what it stacks is complete."""
    config, tensors = read(folder)
    assert faults(config, SGLANG_CONFIG) == []
    names = config["target_modules"]
    last = (
        {n.rpartition(".")[2] for n in names}
        if isinstance(names, list)
        else {*ATTENTION, *MLP, "embed_tokens", "lm_head"}
    )
    targets = {SGLANG_PACKED.get(n, n) for n in last}
    assert targets <= SGLANG_MODULES, targets
    for key in tensors:
        module = VLLM_KEY.fullmatch(key)["module"]
        assert re.search(r"layers\.\d+\.", key) or "embed_tokens" in key or "lm_head" in key
        leaf = module.rpartition(".")[2]
        assert SGLANG_PACKED.get(leaf, leaf) in targets, module
        if ".experts" in module:
            assert re.search(r"\.experts\.\d+\.", module), f"{module}: no expert, dropped"
        for first, needed in (("q_proj", "v_proj"), ("k_proj", "q_proj"), ("up_proj", "gate_proj")):
            assert leaf != first or key.replace(first, needed) in tensors, f"{key} without {needed}"


def assert_updates(model, found):
    """`found`, by parameter name, is what merging adds to the model's parameters."""
    base = model.get_base_model()
    before = {n: p.detach().clone() for n, p in base.named_parameters(remove_duplicate=False)}
    model.base_model.merge_adapter()
    after = dict(base.named_parameters(remove_duplicate=False))
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed == set(found)
    for name in changed:
        update = (after[name] - before[name]).detach()
        expected = found[name].mT if update.shape != found[name].shape else found[name]
        torch.testing.assert_close(update, expected, atol=1e-6, rtol=1e-5)


# Files


DENSE = {
    "default targets": {},
    "attention and mlp": {"target_modules": [*ATTENTION, *MLP]},
    "all linear": {"target_modules": "all-linear"},
    "head": {"target_modules": ["q_proj", "v_proj", "lm_head"]},
}
TIED = ("tied_llama", "head")  # its merged head would no longer be the embedding


@pytest.mark.parametrize(("name", "case"), [(n, c) for n in ("qwen3", "tied_llama") for c in DENSE if (n, c) != TIED])
def test_servers_read_what_save_pretrained_writes(tmp_path, name, case):
    model = adapted(name, **DENSE[case])
    model.save_pretrained(tmp_path)
    sglang_accepts(tmp_path)
    assert_updates(model, vllm_updates(tmp_path, name))


def test_servers_read_what_save_adapter_writes(tmp_path):
    graph = tuned(captured("tied_llama"), {"r": 4, "lora_alpha": 6})
    sglang_accepts(peft_fx.save_adapter(graph, tmp_path))
    merged = peft_fx.merge(graph)
    before, after = dict(graph.named_parameters()), dict(merged.named_parameters())
    updates = vllm_updates(tmp_path, "tied_llama")
    assert len(updates) == 2
    for name, update in updates.items():
        torch.testing.assert_close(after[name] - before[name], update, atol=1e-6, rtol=1e-5)


def test_vllm_reads_rank_stabilised_scales_and_embeddings(tmp_path):
    model = adapted("qwen3", target_modules=["embed_tokens", "q_proj", "v_proj"], use_rslora=True)
    model.save_pretrained(tmp_path)
    assert "base_model.model.model.embed_tokens.lora_embedding_A" in read(tmp_path)[1]
    assert_updates(model, vllm_updates(tmp_path, "qwen3"))


def test_vllm_reads_factors_of_stacked_experts_where_checkpoints_are_stacked(tmp_path):
    """PEFT's own format; in whichever order the config names the two, base_layer is gate_up_proj."""
    for parameters in (STACKS, STACKS[::-1]):
        model = adapted("gpt_oss", target_modules=["q_proj", "v_proj"], target_parameters=parameters)
        model.save_pretrained(tmp_path)
        assert any(".experts.base_layer.lora_A" in key for key in read(tmp_path)[1])
        assert_updates(model, vllm_updates(tmp_path, "gpt_oss"))


MIXTURES = {
    "experts": {"target_modules": [], "target_parameters": STACKS},
    "experts and attention": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "target_parameters": STACKS},
    "a regex": {"target_modules": r".*\.(q_proj|v_proj)", "target_parameters": STACKS},
    "patterns": {
        "target_modules": ["q_proj", "v_proj"], "target_parameters": STACKS, "use_rslora": True,
        "rank_pattern": {r".*\.gate_up_proj": 3, "q_proj": 5}, "alpha_pattern": {"v_proj": 20},
    },
}  # fmt: skip


@pytest.mark.parametrize("case", MIXTURES)
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_servers_and_peft_read_experts_apart(tmp_path, name, case):
    model = adapted(name, **MIXTURES[case])
    assert save_for_serving(model, tmp_path / "apart") == tmp_path / "apart"
    sglang_accepts(tmp_path / "apart")
    ids = torch.arange(8).view(2, 4)
    theirs = peft.PeftModel.from_pretrained(model_of(name), tmp_path / "apart").eval()
    torch.testing.assert_close(theirs(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    assert_updates(model, vllm_updates(tmp_path / "apart", name))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_stacked_factors_are_not_what_these_servers_read(tmp_path, name):
    """Why `save_for_serving` is there: PEFT's files of these models need vLLM's enable_mixed_moe_lora_format."""
    adapted(name, target_modules=["q_proj", "v_proj"], target_parameters=STACKS).save_pretrained(tmp_path)
    with pytest.raises(AssertionError, match="experts"):
        vllm_factors(tmp_path, name)
    with pytest.raises(AssertionError):
        sglang_accepts(tmp_path)


def test_without_experts_apart_the_tensors_are_pefts(tmp_path):
    for name, parameters in (("qwen3", None), ("gpt_oss", STACKS)):
        model = adapted(name, target_modules=["q_proj", "v_proj"], target_parameters=parameters)
        model.save_pretrained(tmp_path / "plain")
        save_for_serving(model, tmp_path / "served")
        (_, plain), (_, served) = read(tmp_path / "plain"), read(tmp_path / "served")
        assert plain.keys() == served.keys() and all(torch.equal(plain[k], served[k]) for k in plain)


REFUSED = {
    "use_dora=True": {"use_dora": True},
    "lora_bias=True": {"lora_bias": True},
    "bias='lora_only'": {"bias": "lora_only"},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "trainable_token_indices": {"trainable_token_indices": [1]},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_no_server_can_have_is_refused(tmp_path, reason):
    model = adapted("qwen3", target_modules=["q_proj"], **REFUSED[reason])
    with pytest.raises(RecipeError, match=re.escape(reason)):
        save_for_serving(model, tmp_path)
    assert not list(tmp_path.iterdir())
    model.save_pretrained(tmp_path)
    assert reason == "lora_bias=True" or faults(read(tmp_path)[0], VLLM_CONFIG)


def test_other_methods_and_convolutions_are_refused(tmp_path):
    other = peft_fx.get_peft_model(model_of("qwen3"), peft_fx.LoHaConfig(target_modules=["q_proj"]))
    with pytest.raises(RecipeError, match="LOHA"):
        save_for_serving(other, tmp_path)
    other = peft_fx.get_peft_model(build("convolutions"), peft_fx.LoraConfig(target_modules=["one"]))
    with pytest.raises(RecipeError, match="convolution .one.weight"):
        save_for_serving(other, tmp_path)
