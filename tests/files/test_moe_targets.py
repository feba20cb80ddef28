"""LoRA on mixtures of experts with transformers 4's names: configs as PEFT converts them, and files with a pair per expert."""

import copy
import json

import peft
import pytest
import torch
import transformers as hf
from conformance import quiet
from safetensors.torch import load_file, save_file
from torch import nn

import peft_fx
from peft_fx.errors import AdapterFileError, RecipeError
from peft_fx.hf.files.serving import save_for_serving
from peft_fx.planning import moe

pytestmark = pytest.mark.slow

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 2, "vocab_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
ROUTED = {**SMALL, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
MODELS = {
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**SMALL, num_local_experts=3)),
    "olmoe": lambda: hf.OlmoeForCausalLM(hf.OlmoeConfig(**SMALL, num_experts=3, num_experts_per_tok=2)),
    "qwen2_moe": lambda: hf.Qwen2MoeForCausalLM(
        hf.Qwen2MoeConfig(**ROUTED, num_experts=3, shared_expert_intermediate_size=20)),
    "qwen3_moe": lambda: hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**ROUTED, num_experts=3, head_dim=8)),
    "half_dense": lambda: hf.Qwen3MoeForCausalLM(  # the second layer has no experts
        hf.Qwen3MoeConfig(**ROUTED, num_experts=3, head_dim=8, mlp_only_layers=[1])),
    "deepseek_v2": lambda: hf.DeepseekV2ForCausalLM(hf.DeepseekV2Config(
        **ROUTED, n_routed_experts=3, n_shared_experts=1, first_k_dense_replace=1, kv_lora_rank=8, q_lora_rank=None,
        qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, head_dim=8, n_group=1, topk_group=1)),
}  # fmt: skip
FORMER = {name: ["w1", "w3", "w2"] if name == "mixtral" else ["gate_proj", "up_proj", "down_proj"] for name in MODELS}
CHOOSING = ("target_modules", "target_parameters")
IDS = torch.arange(8).view(2, 4)


def model_of(name):
    torch.manual_seed(0)
    return MODELS[name]().eval()


def logits(model):
    return model(input_ids=IDS).logits


def with_names(name, options):
    """Options with %s for the names of experts."""
    targets = options.get("target_modules")
    if isinstance(targets, str):
        return {**options, "target_modules": targets.replace("%s", "|".join(FORMER[name]))}
    return {**options, "target_modules": [n for t in targets for n in (FORMER[name] if t == "%s" else [t])]}


def made(library, name, options, folder):
    """What get_peft_model makes of a seed: model, file, config, and the generator's state."""
    config = library.LoraConfig(**{"r": 4, "lora_alpha": 6, "init_lora_weights": False, **copy.deepcopy(options)})
    model = model_of(name)
    torch.manual_seed(3)
    model, state = quiet(library.get_peft_model, model, config), torch.get_rng_state()
    model.save_pretrained(folder)
    saved = json.loads((folder / "adapter_config.json").read_text())
    fields = {f: saved[f] for f in (*CHOOSING, "rank_pattern", "alpha_pattern")}
    fields |= {f: sorted(fields[f] or ()) for f in CHOOSING if not isinstance(fields[f], str)}
    return model.eval(), load_file(folder / "adapter_model.safetensors"), fields, state


# Configs

OPTIONS = {
    "all-linear": {"target_modules": "all-linear"},
    "list": {"target_modules": ["q_proj", "%s"]},
    "router": {"target_modules": ["%s", "gate"], "init_lora_weights": True},
    "regex": {"target_modules": r".*\.(q_proj|%s)"},
    "excluding": {"target_modules": r".*layers.*\.(q_proj|%s)", "exclude_modules": ["layers.1.self_attn.q_proj"]},
    "patterns": {"target_modules": ["q_proj", "%s"], "rank_pattern": {"q_proj": 2, "down_proj": 3},
                 "alpha_pattern": {"down_proj": 5}, "use_rslora": True},
    "attention": {"target_modules": ["q_proj"]},
}  # fmt: skip
QUICK = {*(("mixtral", which) for which in ("all-linear", "router", "regex", "patterns")),
         ("qwen2_moe", "list"), ("qwen3_moe", "regex"), ("half_dense", "list"),
         ("deepseek_v2", "all-linear"), ("olmoe", "list")}  # fmt: skip


def cases(table, quick):
    return [pytest.param(name, which, marks=[] if (name, which) in quick else [pytest.mark.slow], id=f"{name}-{which}")
            for name in MODELS for which in table]  # fmt: skip


@pytest.mark.parametrize("name, which", cases(OPTIONS, QUICK))
def test_config_tensors_and_outputs_are_pefts(name, which, tmp_path):
    if (name, which) == ("qwen2_moe", "router"):
        pytest.skip("its router is no module that either of us knows")
    options = with_names(name, OPTIONS[which])
    theirs, expected, fields, state = made(peft, name, options, tmp_path / "theirs")
    ours, found, our_fields, our_state = made(peft_fx, name, options, tmp_path / "ours")
    assert found.keys() == expected.keys() and all(torch.equal(found[key], t) for key, t in expected.items())
    assert torch.equal(our_state, state)
    if (name, which) != ("qwen2_moe", "all-linear"):  # no conversion there, and PEFT writes out what "all-linear" is
        assert our_fields == fields
    torch.testing.assert_close(logits(ours), logits(theirs))
    again = peft_fx.PeftModel.from_pretrained(model_of(name), tmp_path / "theirs")
    assert torch.equal(logits(again), logits(ours))


def test_experts_are_in_all_linear_and_shared_ones_are_not():
    config = peft_fx.LoraConfig(target_modules="all-linear")
    chosen = {
        name: {t.path for t in peft_fx.get_peft_model(model_of(name), config).base_model.targets}
        for name in ("mixtral", "deepseek_v2")
    }
    assert {f"model.layers.{i}.mlp.{m}" for i in range(2) for m in ("experts", "gate")} < chosen["mixtral"]
    assert "model.layers.1.mlp.experts" in chosen["deepseek_v2"]
    assert not any("shared_experts" in path for path in chosen["deepseek_v2"])


def test_a_pattern_of_ones_own_for_the_stack_is_the_one_in_the_file(tmp_path):
    options = {
        "target_modules": ["w1", "w2", "w3"],
        "alpha_pattern": {"gate_up_proj": 5},
        "rank_pattern": {"gate_up_proj": 3},
    }
    theirs, expected, _, _ = made(peft, "mixtral", options, tmp_path / "theirs")
    ours, found, our_fields, _ = made(peft_fx, "mixtral", options, tmp_path / "ours")
    assert all(torch.equal(found[key], t) for key, t in expected.items())
    torch.testing.assert_close(logits(ours), logits(theirs))
    assert our_fields["alpha_pattern"] == {"gate_up_proj": 5} and our_fields["rank_pattern"] == {"gate_up_proj": 3}
    again = quiet(peft.PeftModel.from_pretrained, model_of("mixtral"), tmp_path / "ours")
    torch.testing.assert_close(logits(again), logits(ours))


def test_graphs_get_the_same():
    config = peft_fx.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    torch.manual_seed(3)
    graph = peft_fx.apply(peft_fx.capture(model_of("qwen3_moe"), (), {"input_ids": IDS}), config)
    assert config.target_modules == "all-linear" and not config.rank_pattern  # the caller's own
    torch.manual_seed(3)
    model = peft_fx.get_peft_model(model_of("qwen3_moe"), config)
    torch.testing.assert_close(graph(input_ids=IDS).logits, logits(model))


@pytest.mark.parametrize("targets", [["q_proj", "w1"], ["mlp.w3", "w2"], r".*\.(q_proj|w1)"])
def test_one_of_two_weights_in_a_stack_is_refused_as_in_peft(targets):
    messages = []
    for library in (peft, peft_fx):
        with pytest.raises(ValueError, match="Cannot convert PEFT target") as info:
            library.get_peft_model(model_of("mixtral"), library.LoraConfig(target_modules=targets))
        messages.append(str(info.value))
    assert messages[0] == messages[1]


def test_other_methods_and_other_models_are_left_alone():
    with pytest.raises(RecipeError):
        peft_fx.get_peft_model(model_of("mixtral"), peft_fx.LoHaConfig(target_modules=["w1", "w3"]))
    shared = peft_fx.get_peft_model(model_of("qwen2_moe"), peft_fx.LoraConfig(target_modules=["gate_proj"]))
    assert all("shared_expert." in path for path in shared.base_model.targeted_module_names)


def test_the_table_of_models_is_transformers_and_pefts():
    from peft.utils.transformers_weight_conversion import _MODEL_TO_CONVERSION_PATTERN, _MOE_TARGET_MODULE_MAPPING

    theirs = {model: _MOE_TARGET_MODULE_MAPPING[kind] for model, kind in _MODEL_TO_CONVERSION_PATTERN.items()
              if kind in _MOE_TARGET_MODULE_MAPPING and model.islower()}  # fmt: skip
    assert theirs == moe.NAMES


# Files


def former_file(name, folder, targets, layers=(0, 1), r=4, **config):
    """An adapter of transformers 4, and what it adds: parameter -> update, in float64."""
    torch.manual_seed(7)
    tensors, updates, model = {}, {}, model_of(name)
    alpha = config.pop("alpha", {})
    scale = lambda old: alpha.get(old, 6) / (r**0.5 if config.get("use_rslora") else r)  # noqa: E731

    def pair(path, old, out, features):
        path = path.replace(".mlp.", ".block_sparse_moe.") if name == "mixtral" else path
        A, B = torch.randn(r, features), torch.randn(out, r)
        tensors.update({f"base_model.model.{path}.lora_A.weight": A, f"base_model.model.{path}.lora_B.weight": B})
        return scale(old) * B.double() @ A.double()

    for path, module in model.named_modules():
        leaf = path.rpartition(".")[2]
        if f".{path}".partition("layers.")[2][:1] not in map(str, layers):
            continue
        if isinstance(getattr(module, "gate_up_proj", None), nn.Parameter):
            *halves, down = FORMER[name]
            for parameter, parts in (("gate_up_proj", halves), ("down_proj", [down])):
                if targets.isdisjoint(parts):
                    continue
                E, out, features = getattr(module, parameter).shape
                own = [
                    [pair(f"{path}.{e}.{part}", part, out // len(parts), features) for part in parts] for e in range(E)
                ]
                updates[f"{path}.{parameter}"] = torch.stack([torch.cat(u) for u in own])
        elif leaf in targets and hasattr(module, "weight"):
            updates[f"{path}.weight"] = pair(path, leaf, *module.weight.shape)
    quiet(
        peft.LoraConfig(r=r, lora_alpha=6, target_modules=targets, alpha_pattern=alpha, **config).save_pretrained,
        folder,
    )
    save_file(tensors, folder / "adapter_model.safetensors")
    return updates


def updated(name, updates):
    model = model_of(name)
    with torch.no_grad():
        for parameter, update in updates.items():
            model.get_parameter(parameter).add_(update)
    return model


FILES = {
    "experts": {"targets": {"q_proj", "%s"}},
    "router": {"targets": {"o_proj", "%s", "gate"}},
    "gate and up": {"targets": {"q_proj", "%gate_up"}},
    "down": {"targets": {"%down"}},
    "one layer": {"targets": {"q_proj", "%s"}, "layers": [1], "layers_to_transform": [1]},
    "rslora": {"targets": {"%s"}, "use_rslora": True},
    "dropout": {"targets": {"%s"}, "lora_dropout": 0.1},
}
EXPANDED = {"%s": slice(0, 3), "%gate_up": slice(0, 2), "%down": slice(2, 3)}
QUICK_FILES = {*(("mixtral", which) for which in ("experts", "gate and up", "one layer", "rslora")),
               ("qwen2_moe", "router"), ("half_dense", "gate and up"),
               ("deepseek_v2", "experts"), ("qwen3_moe", "experts")}  # fmt: skip
# What PEFT loads too, every tensor in its place. Elsewhere it drops some or scales them otherwise.
ALIKE = {(name, which) for name in ("mixtral", "olmoe", "qwen3_moe") for which in ("experts", "router", "down")}


def options_of(name, which):
    options = dict(FILES[which])
    targets = {n for t in options["targets"] for n in (FORMER[name][EXPANDED[t]] if t in EXPANDED else [t])}
    return {**options, "targets": targets}


@pytest.mark.parametrize("name, which", cases(FILES, QUICK_FILES))
def test_a_pair_per_expert_is_loaded_into_the_stack(name, which, tmp_path):
    updates = former_file(name, tmp_path, **options_of(name, which))
    model = quiet(peft_fx.PeftModel.from_pretrained, model_of(name), tmp_path)
    torch.testing.assert_close(logits(model), logits(updated(name, updates)), rtol=1e-4, atol=1e-5)
    assert {f"{p.target.tensor_name}" for p in model.base_model.backend.acting()} == set(updates)
    if (name, which) in ALIKE:
        theirs = quiet(peft.PeftModel.from_pretrained, model_of(name), tmp_path)
        torch.testing.assert_close(logits(model), logits(theirs))
    model.save_pretrained(tmp_path / "again")
    for library in (peft_fx, *([] if which == "dropout" else [peft])):  # which PEFT's parameters do not have
        again = quiet(library.PeftModel.from_pretrained, model_of(name), tmp_path / "again")
        torch.testing.assert_close(logits(again), logits(model))


def test_graphs_load_and_swap_them(tmp_path):
    updates = former_file("mixtral", tmp_path / "a", {"q_proj", *FORMER["mixtral"]}, alpha={"w1": 3})
    graph = peft_fx.capture(model_of("mixtral"), (), {"input_ids": IDS})
    loaded = peft_fx.load_adapter(graph, tmp_path / "a")
    expected = logits(updated("mixtral", updates))
    torch.testing.assert_close(loaded(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)
    other = peft_fx.apply(graph, peft_fx.LoraConfig(r=4, target_modules=["q_proj", *FORMER["mixtral"]]))
    peft_fx.hotswap(other, tmp_path / "a")
    torch.testing.assert_close(other(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", pytest.param("qwen3_moe", marks=pytest.mark.slow)])
@pytest.mark.parametrize("options", [
    {"target_modules": "all-linear"},
    {"target_modules": ["q_proj"], "target_parameters": ["gate.weight"]},
    {"target_modules": [], "target_parameters": ["gate_up_proj"], "rank_pattern": {"gate_up_proj": 3}, "use_rslora": True},
], ids=["all-linear", "router", "gate_up"])  # fmt: skip
def test_what_was_saved_for_serving_loads_again(name, options, tmp_path):
    torch.manual_seed(1)
    config = peft_fx.LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, **options)
    model = peft_fx.get_peft_model(model_of(name), config).eval()
    save_for_serving(model, tmp_path)
    again = peft_fx.PeftModel.from_pretrained(model_of(name), tmp_path)
    torch.testing.assert_close(logits(again), logits(model))


def changed(folder, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


EXPERT = "base_model.model.model.layers.0.block_sparse_moe.experts.1.w3"
FAULTS = {
    "missing: .*experts.1.w3.lora_A": lambda t: t.pop(f"{EXPERT}.lora_A.weight"),
    r"experts.1.w3.lora_B.*expected shape \[24, 4\], got \[23, 4\]":
        lambda t: t.update({f"{EXPERT}.lora_B.weight": torch.zeros(23, 4)}),
    r"experts.1.w3.lora_A.*expected shape \[4, 16\], got \[2, 16\]":
        lambda t: t.update({f"{EXPERT}.lora_A.weight": torch.zeros(2, 16)}),
}  # fmt: skip
LEFT_OVER = {
    "experts.3.w3.lora_A":
        lambda t: t.update({f"{EXPERT}.lora_A.weight".replace("1.w3", "3.w3"): torch.zeros(4, 16)}),
    "experts.1.w3.lora_magnitude_vector": lambda t: t.update({f"{EXPERT}.lora_magnitude_vector": torch.ones(24)}),
}  # fmt: skip


@pytest.mark.parametrize("message", FAULTS)
def test_files_that_do_not_fit_are_refused(message, tmp_path):
    former_file("mixtral", tmp_path, set(FORMER["mixtral"]))
    changed(tmp_path, FAULTS[message])
    with pytest.raises(AdapterFileError, match=message):
        peft_fx.PeftModel.from_pretrained(model_of("mixtral"), tmp_path)


@pytest.mark.parametrize("message", LEFT_OVER)
def test_what_is_left_over_of_a_file_is_named(message, tmp_path):
    former_file("mixtral", tmp_path, set(FORMER["mixtral"]))
    changed(tmp_path, LEFT_OVER[message])
    with pytest.warns(UserWarning, match=f"(?s)left out.*{message}"):
        peft_fx.PeftModel.from_pretrained(model_of("mixtral"), tmp_path)
