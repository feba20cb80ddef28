"""LoRA files of other programs that cannot be loaded, and the reason that the text gives."""

import json

import pytest
import torch
from lora_files import KOHYA, factors, flat, named, peft_keys, read, same, table_of
from torch import nn

from peft_fx.errors import AdapterFileError
from peft_fx.files import read_adapter
from peft_fx.planning.modules import module_table
from peft_fx.planning.plan import PREFIX

pytestmark = pytest.mark.filterwarnings("ignore:Accessing config attribute:FutureWarning")

Q = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
PAIR = {f"unet.{Q}.lora_A.weight": (2, 16), f"unet.{Q}.lora_B.weight": (16, 2)}
FLUX_QKV = "lora_unet_double_blocks_0_img_attn_qkv"
REFUSED = {
    "nothing": ("unet", {}, "it has no tensors"),
    "another model's": ("te", PAIR, "names no module of this CLIPTextModel; it has 1 module(s) of the denoiser"),
    "a module that is not there": ("unet", {**PAIR, f"unet.{Q}x.lora_A.weight": (2, 16)}, f"{Q}x (nearest module: {Q})"),
    "an unknown tensor": ("unet", {**PAIR, f"unet.{Q}.diff_b": (16,)}, f"unet.{Q}.diff_b"),
    "PEFT's keys": ("unet", {f"{PREFIX}{Q}.lora_A.weight": (2, 16)}, "give the folder with both files"),
    "a factor missing": ("unet", dict([next(iter(PAIR.items()))]), f"missing: {PREFIX}{Q}.lora_B.weight"),
    "another shape": ("unet", {**PAIR, f"unet.{Q}.lora_B.weight": (8, 2)}, "expected shape [16, 2], got [8, 2]"),
    "an alpha alone": ("unet", {f"unet.{Q}.alpha": ()}, "alphas alone"),
    "alphas": ("unet", {**PAIR, f"unet.{Q}.alpha": (2,)}, "expected alpha to be one finite number"),
    "no rank": ("unet", {f"unet.{Q}.lora_B.weight": (16, 2)}, "no factor that tells the rank"),
    "rank 0": ("unet", {f"unet.{Q}.lora_A.weight": (0, 16), f"unet.{Q}.lora_B.weight": (16, 0)}, "expected an integer from 1"),
    "twice": ("unet", {**PAIR, f"unet.{Q}.lora.down.weight": (2, 16)}, f"another lora_A.weight for module {Q}"),
    "two methods": ("unet", {**PAIR, f"unet.{Q}.hada_w1_a": (2, 16)}, "has LOHA and LORA"),
    "rows that cannot be cut": ("flux", {f"{FLUX_QKV}.lora_down.weight": (2, 8), f"{FLUX_QKV}.lora_up.weight": (23, 2)}, "expected 24 rows"),
    "a Kronecker product over three": ("flux", {f"{FLUX_QKV}.lokr_w1": (2, 2), f"{FLUX_QKV}.lokr_w2": (12, 4)}, "cannot be cut into one each"),
    "magnitudes of inputs": ("unet", {**PAIR, f"unet.{Q}.dora_scale": (1, 16)}, "not per input feature"),
    "no common factor": ("flux", {"lora_unet_x_embedder.lokr_w1": (8, 4), "lora_unet_x_embedder.lokr_w2": (1, 1),
                                  "lora_unet_context_embedder.lokr_w1": (4, 4), "lora_unet_context_embedder.lokr_w2": (2, 2)}, "no decompose_factor"),
}  # fmt: skip


@pytest.mark.parametrize("model, shapes, says", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_loaded_is_refused_with_the_reason(tmp_path, model, shapes, says):
    with pytest.raises(AdapterFileError) as error:
        read({key: torch.ones(shape) for key, shape in shapes.items()}, table_of(model), tmp_path)
    assert says in str(error.value) and "file" in str(error.value)


METADATA = [("{", "not valid JSON"), ("[" * 100_000, "not valid JSON"), ("[1]", "expected a JSON object"),
            (json.dumps({"unet.r": 10**9}), "from 1 to"), (json.dumps({"unet.use_qalora": True}), "not in this version yet")]  # fmt: skip


@pytest.mark.parametrize("text, says", METADATA, ids=[f"{i}-{says}" for i, (_, says) in enumerate(METADATA)])
def test_a_bad_config_in_the_metadata_is_refused(tmp_path, text, says):
    with pytest.raises(AdapterFileError, match=says):
        read(
            {key: torch.ones(shape) for key, shape in PAIR.items()},
            table_of("unet"),
            tmp_path,
            {"lora_adapter_metadata": text},
        )


def test_scales_that_a_file_gives_twice_are_refused(tmp_path):
    tensors = {key: torch.ones(shape) for key, shape in PAIR.items()} | {f"unet.{Q}.alpha": torch.tensor(1.0)}
    with pytest.raises(AdapterFileError, match="has scales twice"):
        read(tensors, table_of("unet"), tmp_path, {"lora_adapter_metadata": json.dumps({"unet.r": 2})})


def test_names_that_underscores_make_equal_are_refused(tmp_path):
    model = nn.ModuleDict({"a_b": nn.ModuleDict({"c": nn.Linear(4, 4)}), "a": nn.ModuleDict({"b_c": nn.Linear(4, 4)})})
    adapter = factors(module_table(model))
    with pytest.raises(AdapterFileError, match="names no module"):
        read(named(adapter, flat("lora_unet_"), *KOHYA), module_table(model), tmp_path)
    same(read(named(adapter, lambda path: f"unet.{path}."), module_table(model), tmp_path)[1], peft_keys(adapter))


def test_pickles_damaged_files_and_links_out_of_a_folder_are_refused(tmp_path):
    (tmp_path / "lora.bin").write_bytes(b"")
    with pytest.raises(AdapterFileError, match="pickles are not opened"):
        read_adapter(tmp_path / "lora.bin", table_of("unet"))
    (tmp_path / "lora.safetensors").write_bytes(b"damaged")
    with pytest.raises(AdapterFileError, match="not a sound safetensors file"):
        read_adapter(tmp_path / "lora.safetensors", table_of("unet"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x.safetensors").symlink_to(tmp_path / "lora.safetensors")
    with pytest.raises(AdapterFileError, match="outside its folder"):
        read_adapter(tmp_path / "folder", table_of("unet"))
