"""Plans against PEFT's files as oracle: keys, shapes and what is trained; then the rules of their own."""

import functools
import warnings

import peft
import pytest
import torch
from peft import get_peft_model_state_dict
from tiny import build
from torch import nn

from peft_fx.errors import RecipeError
from peft_fx.methods import get_config, get_method
from peft_fx.methods.lora import LoraConfig
from peft_fx.planning.kinds import stored_shape
from peft_fx.planning.matching import Unmatched
from peft_fx.planning.modules import module_table
from peft_fx.planning.plan import Shared, make_plan


@functools.cache
def table_of(name):
    return module_table(build(name))


def plan_of(name, **options):
    return make_plan(table_of(name), "default", LoraConfig(r=2, **options))


def peft_model(name, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(build(name), peft.LoraConfig(r=2, **options))


def peft_file(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    # with bias="all" PEFT writes the biases inside saved modules again, under keys that it cannot load
    return {k: t for k, t in tensors.items() if ".original_module." not in k and ".modules_to_save." not in k}


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
EMBEDDING_RANK = {"rank_pattern": {"embed_tokens": 3}}
CASES = [
    ("llama", {}),
    ("llama", {"target_modules": "all-linear", "rank_pattern": {"q_proj": 4, r"layers\.1\.mlp.*": 1}}),
    ("llama", {"target_modules": ["embed_tokens", "lm_head"], **EMBEDDING_RANK}),
    ("llama", {"lora_bias": True}),
    ("llama", {"modules_to_save": ["lm_head", "model.norm"]}),
    ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]}),
    ("llama", {"trainable_token_indices": [3, 1]}),
    ("llama", {"trainable_token_indices": {"embed_tokens": [3, 1], "lm_head": [3, 1]}}),
    ("llama", {"trainable_token_indices": {"lm_head": [0, 2, 4]}}),
    ("biased_llama", {"bias": "all"}),
    ("biased_llama", {"bias": "lora_only", "lora_bias": True}),
    ("tied_llama", {"trainable_token_indices": [3, 1]}),
    ("tied_llama", {"trainable_token_indices": {"embed_tokens": [3, 1], "lm_head": [3, 1]}}),
    ("tied_llama", {"trainable_token_indices": {"embed_tokens": [3, 1], "lm_head": [3, 2]}}),
    ("tied_llama", {"trainable_token_indices": {"lm_head": [3, 1]}}),
    ("tied_llama", {"modules_to_save": ["embed_tokens"]}),
    ("tied_llama", {"modules_to_save": ["lm_head"]}),
    ("tied_llama", {"modules_to_save": ["lm_head"], "ensure_weight_tying": True}),
    ("tied_llama", {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}),
    ("tied_llama", {"target_modules": ["lm_head"], "ensure_weight_tying": True}),
    ("tied_llama", {"target_modules": ["q_proj"], "ensure_weight_tying": True}),
    ("gpt2", {}),
    ("gpt2", {"target_modules": ["lm_head"], "ensure_weight_tying": True}),
    ("t5", {"target_modules": ["q"], "modules_to_save": ["shared"]}),
    ("t5", {"trainable_token_indices": [3, 1]}),
    ("gpt2", {"target_modules": ["c_attn", "wte", "lm_head"], "bias": "lora_only"}),
    ("gpt2", {"target_modules": ["c_proj"], "bias": "all"}),
    ("bert", {"task_type": "SEQ_CLS", "bias": "all", "target_modules": "all-linear"}),
    ("t5", {"target_modules": ["q", "shared"]}),
    ("mixtral", {"target_modules": [], "target_parameters": EXPERTS}),
    ("mixtral", {"target_modules": ["q_proj"], "target_parameters": [EXPERTS[1], "mlp.gate.weight"],
                 "rank_pattern": {"experts.down_proj": 4}}),
    ("convolutions", {"target_modules": ["one", "two", "three"], "lora_bias": True}),
    ("convolutions", {"target_modules": ["grouped"], "modules_to_save": ["batch_norm"], "bias": "lora_only"}),
    ("convolutions", {"target_modules": ["one"], "bias": "all"}),
    ("attention", {"target_modules": ["attn", "lin"], "rank_pattern": {"attn": 4}}),
    ("attention", {"target_modules": ["attn"], "bias": "lora_only"}),
    ("attention", {"target_modules": ["attn"], "bias": "all"}),
    ("attention", {"target_modules": ["lin"], "modules_to_save": ["attn"]}),
    ("nested", {"target_modules": ["proj"], "target_parameters": ["first", "experts.second", "flat"]}),
    ("nested", {"target_modules": ["inner"], "target_parameters": ["experts.second", "flat"], "bias": "lora_only"}),
    ("nested", {"target_modules": ["embedding"], "modules_to_save": ["block"]}),
]  # fmt: skip


@pytest.mark.parametrize("model, options", CASES, ids=lambda v: str(v)[:80])
def test_keys_and_shapes_are_those_of_a_file_that_peft_saves(model, options):
    saved = {key: tuple(t.shape) for key, t in peft_file(peft_model(model, **options)).items()}
    plan = plan_of(model, **options)
    ours = {key: tensor.shape for p in plan.placements for _, key, tensor in p.saved()}
    assert ours == saved
    assert sum(1 for p in plan.placements for _ in p.saved()) == len(ours)


@pytest.mark.parametrize("model, options", CASES, ids=lambda v: str(v)[:80])
def test_as_many_numbers_are_trained_as_by_peft(model, options):
    parameters = peft_model(model, **options).parameters()
    theirs = {p.untyped_storage().data_ptr(): p.numel() for p in parameters if p.requires_grad}
    ours = {
        p.resolve(name).name: torch.Size(tensor.shape).numel()
        for p in plan_of(model, **options).placements
        for name, tensor in p.tensors.items()
        if tensor.trainable
    }
    assert sum(ours.values()) == sum(theirs.values())


@pytest.mark.parametrize("model, options", CASES, ids=lambda v: str(v)[:80])
def test_shared_tensors_name_an_earlier_placement_of_the_right_shape(model, options):
    owned = {}
    for placement in plan_of(model, **options).placements:
        for name, tensor in placement.tensors.items():
            if name in placement.shared:
                owner = placement.shared[name]
                shape = owned[owner.name]
                assert tensor.shape == (shape[::-1] if owner.transposed else shape)
            else:
                assert owned.setdefault(placement.state_name(name), tensor.shape) is tensor.shape


@pytest.mark.parametrize("model, options", CASES, ids=lambda v: str(v)[:80])
def test_a_target_names_a_tensor_of_the_model_and_knows_its_stored_shape(model, options):
    tensors = build(model).state_dict()
    for placement in plan_of(model, **options).placements:
        assert tuple(tensors[placement.target.name].shape) == stored_shape(placement.target)


def test_tied_targets_use_transposed_factors_of_the_embedding():
    plan = plan_of("tied_llama", target_modules=["lm_head"], ensure_weight_tying=True)
    head = next(p for p in plan.placements if p.target.path == "lm_head")
    assert head.shared == {
        "lora_A": Shared("default.model.embed_tokens.on_weight.lora_embedding_B", transposed=True),
        "lora_B": Shared("default.model.embed_tokens.on_weight.lora_embedding_A", transposed=True),
    }


def test_all_tied_modules_share_one_pair_of_factors():
    """PEFT ties the (embedding, head) pair only: T5's other two embeddings get factors of their own there."""
    plan = plan_of("t5", target_modules=["lm_head"], ensure_weight_tying=True)
    assert len(plan.placements) == 4
    trained = {p.resolve(n).name for p in plan.placements for n, t in p.tensors.items() if t.trainable}
    assert trained == {f"default.shared.on_weight.lora_embedding_{factor}" for factor in "AB"}


def test_tied_factors_are_the_same_update():
    plan = plan_of("tied_llama", target_modules=["lm_head"], ensure_weight_tying=True)
    embedding, head = plan.placements
    theta = {embedding.state_name(n): torch.randn(t.shape) for n, t in embedding.tensors.items()}
    theta[head.state_name("scaling")] = theta[embedding.state_name("scaling")]

    def adapted(p, W):
        shared = {n: p.resolve(n) for n in p.tensors}
        found = {n: theta[s.name].mT if s.transposed else theta[s.name] for n, s in shared.items()}
        return get_method(p.method).weight(W, None, found, p.target, p.config)[0]

    W = torch.randn(head.target.shape)
    torch.testing.assert_close(adapted(head, W), adapted(embedding, W.mT).mT)


def test_trained_tokens_replace_rows_on_embedding_and_head():
    plan = plan_of("tied_llama", trainable_token_indices=[3, 1])
    rows = torch.randn(2, 16)
    E = torch.randn(32, 16)
    expected = E.clone()
    expected[[3, 1]] = rows
    for p in (p for p in plan.placements if p.method == "TOKENS"):
        W = E.mT if p.target.transposed else E
        method = get_method("TOKENS")
        made = {n: torch.empty(t.shape, dtype=t.dtype or E.dtype) for n, t in p.tensors.items()}
        for name, tensor in p.tensors.items():
            tensor.init(made[name], W)
        assert torch.equal(made["trainable_tokens_delta"], E[[3, 1]])
        new, _ = method.weight(W, None, {**made, "trainable_tokens_delta": rows}, p.target, p.config)
        assert torch.equal(new.mT if p.target.transposed else new, expected)


def test_a_saved_copy_starts_as_the_base_and_buffers_are_not_trained():
    plan = plan_of("convolutions", target_modules=["one"], modules_to_save=["batch_norm"])
    copies = {p.target.parameter: p for p in plan.placements if p.method == "SAVED"}
    assert {n for n, p in copies.items() if p.tensors["weight"].trainable} == {"weight", "bias"}
    W, made = torch.randn(8), torch.empty(8)
    copies["running_mean"].tensors["weight"].init(made, W)
    assert torch.equal(made, W)
    new, _ = get_method("SAVED").weight(torch.zeros(8), None, {"weight": made}, copies["weight"].target, None)
    assert torch.equal(new, W)


def test_a_module_inside_a_saved_one_shares_its_copy_where_it_was_shared():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.block = nn.Linear(2, 2), nn.ModuleDict({"a": nn.Linear(2, 2)})
            self.block["b"] = self.block["a"]
            self.whole = nn.Sequential(self.block["a"])

    plan = make_plan(module_table(Twice()), "x", LoraConfig(target_modules=["lin"], modules_to_save=["whole"]))
    saved = {p.target.name: p.shared for p in plan.placements if p.method == "SAVED"}
    assert saved == {"whole.0.weight": {}, "whole.0.bias": {}}


def test_every_refusal_is_in_one_message_and_strict_false_goes_on_without_them():
    config = LoraConfig(r=3, target_modules=["grouped", "batch_norm", "one"])
    with pytest.raises(RecipeError) as error:
        make_plan(table_of("convolutions"), "x", config)
    assert "grouped.weight: r=3 is not divisible by groups=2" in str(error.value) and "batch_norm" in str(error.value)
    plan = make_plan(table_of("convolutions"), "x", config, strict=False)
    assert [p.target.path for p in plan.placements] == ["one"] and len(plan.refusals) == 2


def test_unmatched_entries_are_in_the_plan():
    plan = plan_of("llama", target_modules=["q_proj", "zzzzz"])
    assert plan.unmatched == (Unmatched("target_modules", "zzzzz"),)


@pytest.mark.parametrize("name", ["", "a.b", "LORA", "SAVED", "training", "forward", None])
def test_adapter_names_that_cannot_be_a_submodule_are_refused(name):
    with pytest.raises(RecipeError):
        make_plan(table_of("llama"), name, LoraConfig())


def test_internal_methods_are_no_peft_type_for_users():
    for name in ("NOPE", "SAVED"):
        with pytest.raises(RecipeError, match="this version has: .*LORA"):
            get_config(name)
