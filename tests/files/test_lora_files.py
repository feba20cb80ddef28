"""LoRA files of other programs: the same adapter in each format gives the same tensors, bit for bit, with its scales."""

import json

import pytest
import torch
from lora_files import KOHYA, Small, factors, flat, named, peft_keys, read, same, scales, table_of
from safetensors.torch import save_file
from torch import nn

import peft_fx
from peft_fx.errors import AdapterFileError
from peft_fx.files import read_adapter
from peft_fx.planning.modules import module_table
from peft_fx.planning.plan import PREFIX, make_plan

pytest.importorskip("diffusers")
from diffusers.utils.state_dict_utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)

pytestmark = pytest.mark.filterwarnings("ignore:Accessing config attribute:FutureWarning")

FORMATS = {
    "peft with a component": ("unet", (), lambda path: f"unet.{path}.", ()),
    "peft": ("unet", (), lambda path: f"{path}.", ()),
    "peft with the adapter's name": ("unet", (), lambda path: f"unet.{path}.", ("lora_A.default.weight", "lora_B.default.weight")),
    "diffusers": ("unet", (), lambda path: f"unet.{path}.", ("lora.down.weight", "lora.up.weight")),
    "kohya": ("unet", (), flat("lora_unet_"), KOHYA),
    "kohya, with dots": ("unet", (), lambda path: f"diffusion_model.{path}.", KOHYA),
    "flux, diffusers": ("flux", (), lambda path: f"transformer.{path}.", ()),
    "flux, underscores": ("flux", (), flat("lora_transformer_"), KOHYA),
    "text encoder": ("te", ("proj", "fc1", "fc2"), lambda path: f"text_encoder.text_model.{path}.", ()),
    "text encoder, diffusers": ("te", ("proj", "fc1", "fc2"), lambda path: f"text_encoder.text_model.{path}.",
                                ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight")),
    "text encoder, kohya": ("te", ("proj", "fc1", "fc2"), flat("lora_te_text_model_"), KOHYA),
    "text encoder, kohya XL": ("te", ("proj", "fc1", "fc2"), flat("lora_te1_text_model_"), KOHYA),
    "second text encoder": ("te2", ("proj", "fc1", "text_projection"), flat("lora_te2_"), KOHYA),
}  # fmt: skip


@pytest.mark.parametrize("model, ends, name, pair", FORMATS.values(), ids=FORMATS)
def test_a_format_gives_the_same_tensors_bit_for_bit(tmp_path, model, ends, name, pair):
    table, adapter = table_of(model), factors(table_of(model), *ends)
    config, found = read(named(adapter, name, *pair), table, tmp_path)
    same(found, peft_keys(adapter))
    assert (config.r, config.lora_alpha, config.rank_pattern, config.alpha_pattern) == (2, 2, {}, {})


def former(path):
    """diffusers' names from when LoRA sat in attention processors."""
    parent, _, child = path.removesuffix(".0").rpartition(".")
    return f"unet.{parent}.processor.{child}_"


def former_text(path):
    parent, _, child = path.rpartition(".")
    return f"text_encoder.text_model.{parent}.to_{child[0] if child != 'out_proj' else 'out'}_"


@pytest.mark.parametrize("model, name, ends, convert", [
    ("unet", former, ("to_q", "to_k", "to_v", "to_out.0"), convert_unet_state_dict_to_peft),
    ("te", former_text, ("_proj",), lambda tensors: convert_state_dict_to_peft(convert_state_dict_to_diffusers(tensors))),
])  # fmt: skip
def test_diffusers_former_names_mean_what_diffusers_makes_of_them(tmp_path, model, name, ends, convert):
    adapter = factors(table_of(model), *ends)
    tensors = named(adapter, name, "lora.down.weight", "lora.up.weight")
    _, found = read(tensors, table_of(model), tmp_path)
    same(found, peft_keys(adapter))
    prefix = "unet." if model == "unet" else "text_encoder.text_model."
    same(found, {f"{PREFIX}{k.removeprefix(prefix)}": t for k, t in convert(tensors).items()})


# Scales


def test_ranks_and_alphas_may_differ_from_module_to_module(tmp_path):
    table, adapter = table_of("flux"), factors(table_of("flux"), ranks=(2, 3, 2, 4))
    tensors = named(adapter, flat("lora_unet_"), *KOHYA)
    given = {path: i + 1.0 for i, path in enumerate(adapter) if i % 3}
    tensors |= {f"{flat('lora_unet_')(path)}alpha": torch.tensor(a, dtype=torch.bfloat16) for path, a in given.items()}
    config, found = read(tensors, table, tmp_path)
    same(found, peft_keys(adapter))
    ranks = {path: len(A) for path, (A, _) in adapter.items()}
    assert scales(table, config) == {path: given.get(path, r) / r for path, r in ranks.items()}


def test_a_path_that_is_the_end_of_another_chooses_that_module_alone(tmp_path):
    adapter = {path: pair for path, pair in factors(table_of("flux")).items() if path in ("proj_out", "x_embedder")}
    config, found = read(named(adapter, lambda path: f"transformer.{path}."), table_of("flux"), tmp_path)
    assert len(make_plan(table_of("flux"), "x", config).targets) == 2
    same(found, peft_keys(adapter))


def test_the_config_that_diffusers_writes_gives_the_scales(tmp_path):
    adapter = factors(table_of("unet"), "to_q", "to_k")
    written = {"r": 2, "lora_alpha": 6, "use_rslora": False, "target_modules": ["to_k", "to_q"], "alpha_pattern": {"to_k": 8},
               "peft_type": "LORA", "task_type": None}  # fmt: skip
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps({f"unet.{k}": v for k, v in written.items()})}
    config, found = read(named(adapter, lambda path: f"unet.{path}."), table_of("unet"), tmp_path, metadata)
    same(found, peft_keys(adapter))
    assert all(s == (4 if path.endswith("to_k") else 3) for path, s in scales(table_of("unet"), config).items())


def test_doras_magnitudes_and_biases_of_b(tmp_path):
    adapter = factors(table_of("sd15"), "to_q", "conv1")
    tensors, expected = named(adapter, flat("lora_unet_"), *KOHYA), peft_keys(adapter)
    for path, (_, B) in adapter.items():
        m = torch.rand(len(B))
        tensors[f"{flat('lora_unet_')(path)}dora_scale"] = m.reshape(-1, *(1 for _ in B.shape[1:]))
        expected[f"{PREFIX}{path}.lora_magnitude_vector"] = m if B.dim() == 2 else m.reshape(1, -1, 1, 1)
    config, found = read(tensors, table_of("sd15"), tmp_path)
    assert config.use_dora
    same(found, expected)
    tensors = named(adapter, lambda path: f"{path}.") | {
        f"{path}.lora_B.bias": torch.rand(len(B)) for path, (_, B) in adapter.items()
    }
    assert read(tensors, table_of("sd15"), tmp_path)[0].lora_bias


# Which part of a pipeline


def test_the_part_for_the_model_is_taken_and_the_others_are_named(tmp_path):
    parts = {"unet": ("unet", "lora_unet_"), "te": ("te", "lora_te1_text_model_"), "te2": ("te2", "lora_te2_")}
    adapters = {
        n: factors(table_of(m), *(("q_proj", "fc1") if n != "unet" else ("to_q",)), seed=i)
        for i, (n, (m, _)) in enumerate(parts.items())
    }
    tensors = {k: t for n, (_, prefix) in parts.items() for k, t in named(adapters[n], flat(prefix), *KOHYA).items()}
    save_file(tensors, tmp_path / "all.safetensors")
    for n, (model, _) in parts.items():
        with pytest.warns(UserWarning, match="left out what is for other parts of a pipeline") as said:
            _, found = read_adapter(tmp_path / "all.safetensors", table_of(model))
        same(found, peft_keys(adapters[n]))
        assert len(said) == 1 and ("denoiser" in str(said[0].message)) == (n != "unet")


def test_two_encoders_that_both_fit_are_refused(tmp_path):
    adapter = factors(table_of("te"), "q_proj")
    tensors = named(adapter, flat("lora_te1_text_model_"), *KOHYA) | named(
        adapter, flat("lora_te2_text_model_"), *KOHYA
    )
    with pytest.raises(AdapterFileError, match="text_encoder and text_encoder_2 both fit this model"):
        read(tensors, table_of("te"), tmp_path)


def test_a_pipelines_modules_in_one_model_are_all_adapted(tmp_path):
    model = nn.ModuleDict({"unet": Small(), "text_encoder": Small()})
    table = module_table(model)
    adapter = factors(table)
    same(read(named(adapter, lambda path: f"{path}."), table, tmp_path)[1], peft_keys(adapter))


# Where files lie


def test_a_folder_with_one_such_file_and_a_hub_id_are_read(tmp_path, monkeypatch):
    adapter = factors(table_of("unet"), "to_q")
    save_file(named(adapter, lambda path: f"unet.{path}."), tmp_path / "pytorch_lora_weights.safetensors")
    same(read_adapter(tmp_path, table_of("unet"))[1], peft_keys(adapter))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repo_id, allow_patterns: str(tmp_path))
    same(read_adapter("org/lora", table_of("unet"))[1], peft_keys(adapter))
    (tmp_path / "pytorch_lora_weights.safetensors").rename(tmp_path / "mine.safetensors")
    same(read_adapter(tmp_path, table_of("unet"))[1], peft_keys(adapter))
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(
        AdapterFileError, match="several .safetensors files, give one: mine.safetensors, other.safetensors"
    ):
        read_adapter(tmp_path, table_of("unet"))


def test_an_adapter_folder_is_read_as_before(tmp_path):
    model = Small()
    graph = peft_fx.apply(
        peft_fx.capture(nn.Sequential(model.one), (torch.randn(3, 8),)), {"peft_type": "LORA", "target_modules": ["0"]}
    )
    peft_fx.save_adapter(graph, tmp_path)
    save_file({"a": torch.ones(1)}, tmp_path / "pytorch_lora_weights.safetensors")
    assert read_adapter(tmp_path, module_table(nn.Sequential(model.one)))[0].r == 8
