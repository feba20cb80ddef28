"""Selection against PEFT as oracle, and where it differs on purpose."""

import functools
import json
import warnings
from dataclasses import replace

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_DEFAULTS
from peft.utils.other import AuxiliaryTrainingWrapper as TrainingWrapper
from tiny import build
from torch import nn
from torch._subclasses import FakeTensorMode

from peft_fx.errors import RecipeError
from peft_fx.methods.lora import LoraConfig
from peft_fx.planning import defaults
from peft_fx.planning.modules import module_table
from peft_fx.planning.selection import choose_modules, select
from peft_fx.target import ModuleTable


@functools.cache
def table_of(name):
    return module_table(build(name))


def peft_model(name, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(build(name), peft.LoraConfig(r=2, **options))


def unwrapped(name):
    """A module's path without PEFT's wrappers."""
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


def adapted_by_peft(name, **options):
    model = peft_model(name, **options)
    return {unwrapped(n) for n, m in model.named_modules() if isinstance(m, LoraLayer)}


SAME_AS_PEFT = [
    ("llama", {}),
    ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    ("llama", {"target_modules": "all-linear"}),
    ("llama", {"target_modules": "ALL-LINEAR"}),
    ("llama", {"target_modules": r".*layers\.1\..*_proj"}),
    ("llama", {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"}),
    ("llama", {"target_modules": ["q_proj", "model.layers.1.mlp.up_proj"], "layers_to_transform": [0]}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": []}),
    ("llama", {"target_modules": ["mlp.up_proj", "embed_tokens", "lm_head"]}),
    ("llama", {"target_modules": "all-linear", "exclude_modules": ["mlp.up_proj", "q_proj"]}),
    ("llama", {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*\.0\..*"}),
    ("llama", {"target_modules": "all-linear", "modules_to_save": ["mlp"]}),
    ("llama", {"target_modules": [f"model.layers.{i}.{m}" for i in range(2) for m in (
        *(f"self_attn.{p}_proj" for p in "qkvo"), *(f"mlp.{p}_proj" for p in ("up", "down", "gate")))] * 2}),
    ("gpt2", {}),
    ("gpt2", {"target_modules": "all-linear"}),
    ("gpt2", {"target_modules": ["c_proj", "wte"]}),
    ("bert", {"target_modules": "all-linear"}),
    ("bert", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    ("bert", {"target_modules": ["query", "word_embeddings"], "task_type": "SEQ_CLS"}),
    ("t5", {}),
    ("t5", {"target_modules": "all-linear"}),
    ("t5", {"target_modules": r"decoder\..*(EncDecAttention).*\.(q|v)"}),
    ("mixtral", {"target_modules": ["q_proj"]}),
    ("mixtral", {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}),
    ("mixtral", {"target_parameters": ["down_proj"]}),
    ("mixtral", {"target_modules": ["q_proj"], "target_parameters": ["mlp.gate.weight"]}),
    ("llama", {"target_parameters": ["mlp.up_proj.weight"]}),
    ("convolutions", {"target_modules": ["one", "two", "three", "grouped"]}),
    ("attention", {"target_modules": ["lin", "attn"]}),
    ("nested", {"target_modules": ["proj"]}),
    ("nested", {"target_modules": ["proj"], "layers_to_transform": [1, 2], "layers_pattern": ["layers"]}),
    ("nested", {"target_modules": "all-linear"}),
    ("nested", {"target_modules": ["embedding"], "target_parameters": ["experts.first"]}),
]  # fmt: skip


@pytest.mark.parametrize("model, options", SAME_AS_PEFT, ids=lambda v: str(v)[:70])
def test_the_adapted_modules_are_those_of_peft(model, options):
    selection = select(table_of(model), LoraConfig(r=2, **options))
    assert {t.path for t in selection.targets} == adapted_by_peft(model, **options)
    assert not selection.refusals and not selection.unmatched


PATHS = ["model", "model.layers", "model.layers.0.q", "model.layers.1.q", "model.layers.1.mlp.v", "h.2.experts.1.q",
         "q", "v", "layers.0.q", "model.layers.10.up_q", "encoder.block.1.layer.0.v"]  # fmt: skip
PIECES = st.sampled_from(["q", "v", "model", "layers", "0", "1", "10", "mlp", ".*", r"\.", "(q|v)", "h", "[0-9]+"])
REGEX = st.lists(PIECES, min_size=1, max_size=5).map("".join)
NAMES = st.lists(st.sampled_from([*PATHS, "layers.1.q", "1.q", "up_q", "mlp.v", "layer.0.v"]), min_size=1, max_size=4)


def fake_table(paths):
    linear = module_table(nn.Linear(2, 2)).records[0]
    return ModuleTable(tuple(replace(linear, path=p) for p in paths))


@settings(max_examples=200, deadline=None)
@given(
    wanted=REGEX | NAMES,
    exclude=st.none() | REGEX | NAMES,
    layers=st.none() | st.integers(0, 2) | st.lists(st.integers(0, 10), max_size=2),
    pattern=st.none() | st.sampled_from(["layers", "block", "experts", "h"]) | st.just(["layer", "layers"]),
)
def test_matching_is_that_of_peft(wanted, exclude, layers, pattern):
    by_layer = {} if isinstance(wanted, str) or layers is None else {
        "layers_to_transform": layers, "layers_pattern": pattern}  # fmt: skip
    config = LoraConfig(target_modules=wanted, exclude_modules=exclude, **by_layer)
    theirs = peft.LoraConfig(target_modules=wanted, exclude_modules=exclude, **by_layer)
    chosen, excluded, _ = choose_modules(fake_table(PATHS), config, [])
    expected = {path: check_target_module_exists(theirs, path) for path in PATHS}
    assert {r.path for r in chosen} == {path for path, found in expected.items() if found}
    assert excluded <= {path for path, found in expected.items() if isinstance(found, _ExcludedModule)}


def test_default_targets_are_those_of_peft():
    def comparable(table):
        return {model: names if isinstance(names, str) else set(names) for model, names in table.items()}

    assert comparable(defaults.DEFAULT_TARGETS["LORA"]) == comparable(PEFT_DEFAULTS)


@pytest.mark.parametrize(
    "model, options, says",
    [
        ("llama", {"target_modules": ["q_prj"]}, "q_proj"),
        ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [7]}, "layers_to_transform=[7]"),
        ("llama", {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "is excluded"),
        ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["self_attn"]}, "is excluded"),
        ("llama", {"target_modules": "*_proj"}, "no regular expression"),
        ("llama", {"target_modules": [], "target_parameters": ["experts.w"]}, "experts.w"),
        ("nested", {}, "no default for model type None"),
        ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [99]}, "outside its 32 tokens"),
        ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [1, 1]}, "twice"),
        ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": {"embed": [1]}}, "embed_tokens"),
        ("nested", {"target_modules": ["proj"], "trainable_token_indices": [1]}, "embed_tokens"),
        (
            "llama",
            {"target_modules": ["q_proj"], "trainable_token_indices": [1], "modules_to_save": ["embed_tokens"]},
            "choose one",
        ),
        (
            "tied_llama",
            {
                "target_modules": ["q_proj"],
                "ensure_weight_tying": True,
                "trainable_token_indices": {"embed_tokens": [1], "lm_head": [2]},
            },
            "the same trainable_",
        ),
    ],  # fmt: skip
    ids=lambda v: str(v)[:60],
)
def test_what_chooses_nothing_is_an_error_that_names_the_cause(model, options, says):
    with pytest.raises(RecipeError) as error:
        select(table_of(model), LoraConfig(**options))
    assert says in str(error.value)


@pytest.mark.parametrize(
    "model, options, says",
    [
        ("llama", {"target_modules": ["self_attn"]}, "LlamaAttention"),
        ("attention", {"target_modules": ["other_widths"]}, "kdim or vdim"),
        ("nested", {"target_modules": ["experts"]}, "target_parameters"),
        ("nested", {"target_modules": ["proj"], "target_parameters": ["experts.bias"]}, "2-D and 3-D"),
        ("nested", {"target_modules": ["proj"], "target_parameters": ["0.proj.weight"]}, "chooses its module too"),
        ("nested", {"target_modules": ["proj"], "modules_to_save": ["layers"]}, "ModuleList"),
        ("llama", {"target_modules": ["embed_tokens"], "trainable_token_indices": [1]}, "choose one"),
    ],
    ids=lambda v: str(v)[:60],
)
def test_what_cannot_be_adapted_is_refused_with_the_reason(model, options, says):
    selection = select(table_of(model), LoraConfig(**options))
    assert selection.refusals and all(says in str(r) for r in selection.refusals)


def test_entries_that_match_nothing_are_reported_with_the_nearest_names():
    config = LoraConfig(
        target_modules=["q_proj", "v_prj"], exclude_modules=["nope"], rank_pattern={"q_proj": 4, "k_proj": 2},
        alpha_pattern={"layers.9.q_proj": 1}, modules_to_save=["lm_heads"],
    )  # fmt: skip
    unmatched = {(u.field, u.entry): u.nearest for u in select(table_of("llama"), config).unmatched}
    assert unmatched.keys() == {("target_modules", "v_prj"), ("exclude_modules", "nope"), ("rank_pattern", "k_proj"),
                                ("alpha_pattern", "layers.9.q_proj"), ("modules_to_save", "lm_heads")}  # fmt: skip
    assert "v_proj" in unmatched["target_modules", "v_prj"] and "lm_head" in unmatched["modules_to_save", "lm_heads"]


SAVED_BY_PEFT = [
    ("nested", {"target_modules": ["proj"], "modules_to_save": ["head"]}),
    ("nested", {"target_modules": ["proj"], "modules_to_save": ["lm_head", "dding"]}),
    ("llama", {"modules_to_save": ["norm"]}),
    ("llama", {"modules_to_save": ["model.norm"]}),
    ("bert", {"task_type": "SEQ_CLS", "modules_to_save": ["fier"]}),
    ("bert", {"target_modules": ["query"], "trainable_token_indices": {"_embeddings": [0, 1]}}),
]


@pytest.mark.parametrize("model, options", SAVED_BY_PEFT, ids=lambda v: str(v)[:70])
def test_modules_that_are_trained_whole_match_by_their_ending_as_in_peft(model, options):
    selection = select(table_of(model), LoraConfig(r=2, **options))
    wrapped = {unwrapped(n) for n, m in peft_model(model, **options).named_modules() if isinstance(m, TrainingWrapper)}
    assert {s.path for s in selection.saved} | {t.target.path for t in selection.tokens} == wrapped
    assert wrapped and not selection.unmatched


def test_the_task_type_saves_the_head_that_the_model_has():
    selection = select(table_of("bert"), LoraConfig(task_type="SEQ_CLS"))
    assert [s.path for s in selection.saved] == ["classifier"] and not selection.unmatched


def test_a_shared_module_is_one_target_under_any_of_its_paths():
    for name in ("shared", "head"):
        assert [t.path for t in select(table_of("nested"), LoraConfig(target_modules=[name])).targets] == ["head"]


def test_a_mamba_layer_that_kernels_read_past_is_refused():
    table = ModuleTable(fake_table(["layers.0.in_proj", "layers.0.out_proj"]).records, model_type="mamba")
    selection = select(table, LoraConfig(target_modules=["in_proj", "out_proj"]))
    assert [t.path for t in selection.targets] == ["layers.0.in_proj"]
    assert [r.target_name for r in selection.refusals] == ["layers.0.out_proj"]


def test_attention_projections_follow_the_pattern_of_their_module():
    targets = select(table_of("attention"), LoraConfig(target_modules=["attn", "out_proj"])).targets
    assert [t.name for t in targets] == ["attn.in_proj_weight", "attn.out_proj.weight", "other_widths.out_proj.weight"]
    assert targets[0].pattern_path == targets[1].pattern_path == "attn"


def test_a_parameter_of_an_unknown_class_is_read_as_capture_saw_it():
    table = table_of("nested")
    data = json.loads(json.dumps(table.to_json()))
    next(r for r in data["records"] if r["path"] == "experts")["attributes"]["kinds"] = {"flat": ["linear", True, 1]}
    (target,) = select(ModuleTable.from_json(data), LoraConfig(target_modules=["experts"])).targets
    assert (target.name, target.shape, target.transposed) == ("experts.flat", (4, 5), True)


@pytest.mark.parametrize("model", ["llama", "tied_llama", "gpt2", "t5", "attention", "nested", "convolutions"])
def test_a_module_table_survives_json(model):
    table = table_of(model)
    assert ModuleTable.from_json(json.loads(json.dumps(table.to_json()))) == table


def test_ties_are_found_on_meta_and_fake_tensors():
    with torch.device("meta"):
        meta = build("tied_llama")
    meta.tie_weights()
    with FakeTensorMode():
        fake = nn.Module()
        fake.a, fake.b, fake.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        fake.b.weight = fake.a.weight
    assert module_table(meta).tied == (("model.embed_tokens.weight", "lm_head.weight"),)
    assert module_table(fake).tied == (("a.weight", "b.weight"),)


def test_models_without_embeddings_have_a_table():
    class Odd(nn.Linear):
        def get_input_embeddings(self):
            raise NotImplementedError

        def get_output_embeddings(self):
            return None

    table = module_table(Odd(2, 2))
    assert (table.input_embedding, table.output_head, table.records[0].path) == (None, None, "")
    assert table.records[0].bases == ("Odd", "Linear")
