"""Adapter folders: read what PEFT writes, write what PEFT reads, and refuse what is damaged or hostile."""

import contextlib
import functools
import json
import os
import pickle
import struct
import warnings

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import build
from torch import nn

from peft_fx.errors import AdapterFileError
from peft_fx.files import file_config, match_tensors, read_config, read_tensors, write_adapter
from peft_fx.files import write as write_module
from peft_fx.methods import get_config
from peft_fx.methods.lora import LoraConfig
from peft_fx.planning.modules import module_table
from peft_fx.planning.plan import make_plan


@functools.cache
def table_of(name):
    return module_table(build(name))


def peft_folder(folder, model, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(build(model), peft.LoraConfig(r=2, **options))
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.normal_()
        adapted.save_pretrained(folder)
    return adapted


CASES = [
    ("llama", {"target_modules": "all-linear", "lora_alpha": 4, "rank_pattern": {"q_proj": 4}}),
    ("biased_llama", {"lora_bias": True, "modules_to_save": ["lm_head"], "trainable_token_indices": [1, 2]}),
    ("biased_llama", {"bias": "all", "lora_dropout": 0.1}),
    ("biased_llama", {"bias": "lora_only", "use_rslora": True}),
    ("tied_llama", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 1]}),
    ("tied_llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    ("tied_llama", {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}),
    ("gpt2", {"target_modules": ["c_attn"], "bias": "lora_only"}),
    ("bert", {"task_type": "SEQ_CLS", "target_modules": ["query"], "bias": "all"}),
    ("mixtral", {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}),
    ("convolutions", {"target_modules": ["one", "two", "three"], "modules_to_save": ["batch_norm"]}),
    ("convolutions", {"target_modules": ["grouped"]}),
    ("attention", {"target_modules": ["attn"], "bias": "lora_only"}),
    ("nested", {"target_modules": ["embedding"]}),
]


@pytest.mark.parametrize("model, options", CASES, ids=lambda v: str(v)[:80])
def test_a_folder_that_peft_saved_fits_the_plan_of_its_config(model, options, tmp_path):
    peft_folder(tmp_path, model, **options)
    plan = make_plan(table_of(model), "mine", read_config(tmp_path))
    tensors = read_tensors(tmp_path)
    found = match_tensors(plan, tensors, where=str(tmp_path))
    owned = {p.state_name(n): k for p in plan.placements for n, k, _ in p.saved() if n not in p.shared}
    assert found.keys() == owned.keys()
    assert all(torch.equal(found[name], tensors[key]) for name, key in owned.items())


def random_tensors(plan):
    """File key -> random tensor, equal where the plan shares it."""
    owned = {p.state_name(n): torch.randn(t.shape) for p in plan.placements for n, t in p.tensors.items()}
    keys = {}
    for p in plan.placements:
        for name, key, _ in p.saved():
            source = p.resolve(name)
            keys[key] = owned[source.name].mT if source.transposed else owned[source.name]
            if p.target.parameter == "num_batches_tracked":
                keys[key] = torch.tensor(7)
    return keys


@pytest.mark.parametrize("model, options", CASES, ids=lambda v: str(v)[:80])
def test_peft_loads_what_we_write_with_the_same_values_and_no_warning(model, options, tmp_path):
    config = LoraConfig(r=2, **options)
    plan = make_plan(table_of(model), "mine", config)
    tensors = random_tensors(plan)
    assert write_adapter(tmp_path / "a", file_config(config, plan), tensors) == tmp_path / "a"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # transformers about itself
        warnings.filterwarnings("ignore", message=".*ConvNd layer with groups.*")  # said about every grouped target
        loaded = peft.PeftModel.from_pretrained(build(model), tmp_path / "a")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model_state_dict(loaded, save_embedding_layers=False)
    assert tensors.keys() <= theirs.keys()
    assert all(torch.equal(theirs[key], tensor) for key, tensor in tensors.items())


def test_the_config_round_trips_through_the_folder(tmp_path):
    config = LoraConfig(r=4, target_modules=["q_proj"], rank_pattern={"q": 2}, base_model_name_or_path="org/name")
    write_adapter(tmp_path, config, {})
    read = read_config(tmp_path)
    assert read == LoraConfig(**{**config.__dict__, "inference_mode": True, "peft_version": write_module.PEFT_VERSION})
    text = (tmp_path / "adapter_config.json").read_text()
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True)
    assert json.loads(text).keys() <= {*peft.LoraConfig().to_dict()}


def test_written_tensors_are_contiguous_and_do_not_share_memory(tmp_path):
    shared = torch.randn(4, 6)
    write_adapter(tmp_path, LoraConfig(), {"a": shared, "b": shared, "c": shared.mT, "d": shared[1:]})
    read = read_tensors(tmp_path)
    assert torch.equal(read["c"], shared.mT) and torch.equal(read["d"], shared[1:]) and torch.equal(read["b"], shared)


def test_other_files_stay_and_new_files_replace_the_old(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    for value in (1.0, 2.0):
        write_adapter(tmp_path, LoraConfig(), {"a": torch.full((2,), value)})
    assert read_tensors(tmp_path)["a"].tolist() == [2.0, 2.0]
    assert {p.name for p in tmp_path.iterdir()} == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert not [p for p in tmp_path.parent.iterdir() if p.name.startswith(f".{tmp_path.name}.")]


@pytest.mark.parametrize("fails_at", ["adapter_model.safetensors", "adapter_config.json", ".peft_fx-saved", "new"])
def test_a_failure_leaves_the_old_files_as_they_were(tmp_path, monkeypatch, fails_at):
    folder = tmp_path / "a"
    write_adapter(folder, LoraConfig(r=2), {"a": torch.ones(2)})
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def failing(original):
        def move(source, destination):
            if str(destination).endswith(fails_at) and "former" not in str(source):
                raise OSError("disk full")
            original(source, destination)

        return move

    monkeypatch.setattr(os, "replace", failing(os.replace))
    monkeypatch.setattr(os, "rename", failing(os.rename))
    with pytest.raises(AdapterFileError, match="nothing has changed: disk full"):
        write_adapter(tmp_path / "new" if fails_at == "new" else folder, LoraConfig(r=4), {"a": torch.zeros(2)})
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_file_is_no_folder_to_write_to(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(AdapterFileError, match="is a file"):
        write_adapter(tmp_path / "x", LoraConfig(), {})


# Files that do not fit


def linear_plan():
    model = nn.ModuleDict({"lin": nn.Linear(4, 3)})
    return make_plan(module_table(model), "x", LoraConfig(r=2, target_modules=["lin"]))


GOOD = {"base_model.model.lin.lora_A.weight": (2, 4), "base_model.model.lin.lora_B.weight": (3, 2)}
A, B = GOOD
MISFITS = [
    ({B: None}, "missing: base_model.model.lin.lora_B.weight"),
    ({B: None, "base_model.model.lin.lora_BB.weight": (3, 2)}, "nearest: base_model.model.lin.lora_BB.weight"),
    ({"base_model.model.other.lora_A.weight": (2, 4)}, "not expected: base_model.model.other.lora_A.weight"),
    ({A: (4, 2)}, "expected shape [2, 4], got [4, 2]"),
    ({"base_model.model.lin.base_layer.weight": (9, 9)}, "not expected: base_model.model.lin.base_layer.weight"),
    ({f"base_model.model.l{i}.lora_A.weight": (2, 4) for i in range(9)}, "4 more keys"),
]


@pytest.mark.parametrize("changes, says", MISFITS, ids=[says for _, says in MISFITS])
def test_a_file_that_does_not_fit_is_refused_with_what_is_wrong(changes, says):
    tensors = {key: torch.zeros(shape) for key, shape in {**GOOD, **changes}.items() if shape is not None}
    with pytest.raises(AdapterFileError) as error:
        match_tensors(linear_plan(), tensors, where="some/folder")
    assert says in str(error.value) and "some/folder" in str(error.value)


def test_integers_are_refused_and_half_precision_is_not():
    for dtype, ok in ((torch.int8, False), (torch.bfloat16, True), (torch.float64, True)):
        tensors = {key: torch.zeros(shape, dtype=dtype) for key, shape in GOOD.items()}
        if ok:
            assert len(match_tensors(linear_plan(), tensors, where="w")) == 2
        else:
            with pytest.raises(AdapterFileError, match="expected floating-point numbers, got torch.int8"):
                match_tensors(linear_plan(), tensors, where="w")


def test_base_weights_beside_an_adapted_module_are_ignored():
    tensors = {key: torch.zeros(shape) for key, shape in GOOD.items()}
    tensors["base_model.model.lin.base_layer.weight"] = torch.zeros(3, 4)
    assert len(match_tensors(linear_plan(), tensors, where="w")) == 2


def test_tied_tensors_that_differ_in_the_file_are_refused():
    plan = make_plan(table_of("tied_llama"), "x", LoraConfig(r=2, target_modules=["lm_head"], ensure_weight_tying=True))
    tensors = random_tensors(plan)
    key = "base_model.model.lm_head.lora_A.weight"
    with pytest.raises(AdapterFileError, match="is tied to"):
        match_tensors(plan, {**tensors, key: tensors[key] + 1}, where="w")
    assert match_tensors(plan, {k: t for k, t in tensors.items() if "lm_head" not in k}, where="w")


def test_modules_that_peft_saved_by_their_names_ending_are_read(tmp_path):
    options = {"target_modules": ["proj"], "modules_to_save": ["head"]}
    peft_folder(tmp_path, "nested", **options)
    plan = make_plan(table_of("nested"), "x", read_config(tmp_path))
    found = match_tensors(plan, read_tensors(tmp_path), where="w")
    assert {"x.head.on_weight.weight", "x.lm_head.on_weight.weight", "x.tied_head.on_weight.weight"} <= found.keys()


# Damaged and hostile folders


def config_text(**changes):
    return json.dumps({"peft_type": "LORA", **changes})


def folder_with(tmp_path, config=None, tensors=None, name="adapter_model.safetensors"):
    if config is not None:
        (tmp_path / "adapter_config.json").write_text(config)
    if tensors is not None:
        (tmp_path / name).write_bytes(tensors)
    return tmp_path


BAD_CONFIGS = [
    ("", "not valid JSON"),
    ("[1, 2]", "expected a JSON object"),
    ("{}", "names its peft_type"),
    ("[" * 100_000, "not valid JSON"),
    ('{"peft_type": "LORA"', "not valid JSON"),
    (config_text(peft_type="NOPE"), "'NOPE' is unknown"),
    (config_text(peft_type="SAVED"), "'SAVED' is unknown"),
    (config_text(peft_type=["LORA"]), "is unknown"),
    (config_text(r=10**9), "from 1 to"),
    (config_text(r="8"), "expected int"),
    (config_text(r=None), "expected int"),
    (config_text(rank_pattern={"q": 10**9}), "from 1 to"),
    (config_text(rank_pattern=[1]), "expected a dict"),
    (config_text(target_modules=5), "expected a list of names"),
    (config_text(target_modules=[1]), "expected a list of names"),
    (config_text(arrow_config={"a": 1}), "Arrow is not in this version yet"),
]


@pytest.mark.parametrize("text, says", BAD_CONFIGS, ids=[f"{i}-{says}" for i, (_, says) in enumerate(BAD_CONFIGS)])
def test_a_bad_config_is_refused(tmp_path, text, says):
    with pytest.raises(AdapterFileError) as error:
        read_config(folder_with(tmp_path, text))
    assert says in str(error.value) and "adapter_config.json" in str(error.value)


def safetensors_bytes(header, data=b"", length=None):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape, start, end, dtype="F32"):
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}}


BAD_TENSORS = {
    "empty": b"",
    "text": b"this is no safetensors file",
    "truncated": safetensors_bytes(entry([4], 0, 16), b"\0" * 8),
    "too_long": safetensors_bytes(entry([4], 0, 16), b"\0" * 32),
    "header_past_the_end": safetensors_bytes({}, length=2**40),
    "offsets_past_the_end": safetensors_bytes(entry([2**40], 0, 2**42), b"\0" * 16),
    "shape_and_offsets_differ": safetensors_bytes(entry([400], 0, 16), b"\0" * 16),
    "negative": safetensors_bytes(entry([-4], 0, 16), b"\0" * 16),
    "unknown_dtype": safetensors_bytes(entry([4], 0, 16, "X9"), b"\0" * 16),
}


@pytest.mark.parametrize("data", BAD_TENSORS.values(), ids=BAD_TENSORS)
def test_a_damaged_safetensors_file_is_refused(tmp_path, data):
    with pytest.raises(AdapterFileError, match="adapter_model.safetensors: not a sound safetensors file"):
        read_tensors(folder_with(tmp_path, config_text(), data))


SOUND_TENSORS = {
    **{str(d)[6:]: {"b": torch.ones(2, 3, dtype=d), "a": torch.arange(5).to(d)} for d in (torch.float32, torch.float16,
                                                                                   torch.bfloat16, torch.int64)},
    "mixed": {"a": torch.ones(3, dtype=torch.float16), "b": torch.rand(2, 2), "c": torch.arange(3)},
    "scalar_and_empty": {"a": torch.tensor(2.0), "b": torch.empty(0, 4), "c": torch.rand(1, 2, 1)},
    "none": {},
}  # fmt: skip


@pytest.mark.parametrize("tensors", SOUND_TENSORS.values(), ids=SOUND_TENSORS)
def test_a_safetensors_file_is_read_bit_by_bit(tmp_path, tensors):
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    found = read_tensors(tmp_path)
    assert found.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor)


@pytest.mark.parametrize("spaces", range(4))
def test_numbers_may_start_at_any_byte_of_a_safetensors_file(tmp_path, spaces):
    header = {**entry([2], 0, 8), "__metadata__": {"": " " * spaces}}
    data = safetensors_bytes(header, struct.pack("<2f", 1, 2))
    assert read_tensors(folder_with(tmp_path, config_text(), data))["a"].tolist() == [1, 2]


@pytest.mark.parametrize(
    "new", [{"b": torch.zeros(2), "c": torch.ones(1)}, {"a": torch.ones(3)}], ids=["other", "shorter"]
)
def test_a_file_that_is_replaced_while_it_is_read_is_read_as_a_whole(tmp_path, monkeypatch, new):
    path = tmp_path / "adapter_model.safetensors"
    save_file({"a": torch.ones(300)}, path)
    save_file(new, tmp_path / "new")

    @contextlib.contextmanager
    def replacing(*args, **options):
        with safe_open(*args, **options) as file:
            yield file
        if (tmp_path / "new").exists():
            os.replace(tmp_path / "new", path)

    monkeypatch.setattr("peft_fx.files.read.safe_open", replacing)
    found = read_tensors(tmp_path)
    assert {k: t.tolist() for k, t in found.items()} == {k: t.tolist() for k, t in new.items()}


class Code:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("data", [pickle.dumps(Code(), 2), b"garbage", b"", pickle.dumps({"a": Code()}, 2)], ids=len)
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, monkeypatch, data):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AdapterFileError, match="not a file of tensors only"):
        read_tensors(folder_with(tmp_path, config_text(), data, "adapter_model.bin"))
    assert not (tmp_path / "executed").exists()


def test_code_in_a_torch_archive_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Code()}, tmp_path / "adapter_model.bin")
    with pytest.raises(AdapterFileError, match="not a file of tensors only"):
        read_tensors(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_a_pickle_of_tensors_is_read_and_of_anything_else_refused(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "adapter_model.bin")
    assert read_tensors(tmp_path)["a"].tolist() == [1, 1]
    torch.save([torch.ones(2)], tmp_path / "adapter_model.bin")
    with pytest.raises(AdapterFileError, match="expected a dict of tensors"):
        read_tensors(tmp_path)


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    folder, outside = tmp_path / "adapter", tmp_path / "outside.json"
    folder.mkdir()
    outside.write_text(config_text())
    (folder / "adapter_config.json").symlink_to(outside)
    with pytest.raises(AdapterFileError, match="outside its folder"):
        read_config(folder)


def test_links_of_a_hub_snapshot_are_followed_into_its_blobs_only(tmp_path):
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "123", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "c").write_text(config_text())
    (snapshot / "adapter_config.json").symlink_to("../../blobs/c")
    assert read_config(snapshot) == LoraConfig()
    (tmp_path / "secret").write_bytes(b"")
    (snapshot / "adapter_model.safetensors").symlink_to(tmp_path / "secret")
    with pytest.raises(AdapterFileError, match="outside its folder"):
        read_tensors(snapshot)


NOWHERE = [("no such folder", "no hub id"), ("a/b/c", "no hub id"), ("..", "has no adapter")]


@pytest.mark.parametrize("source, says", NOWHERE)
def test_a_folder_that_is_not_there_is_an_adapter_file_error(tmp_path, monkeypatch, source, says):
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    with pytest.raises(AdapterFileError, match=says):
        read_config(source)


def test_a_hub_id_is_downloaded_and_a_failure_is_an_adapter_file_error(tmp_path, monkeypatch):
    folder_with(tmp_path, config_text(r=3))
    asked = []

    def fake_download(repo_id, allow_patterns):
        asked.append((repo_id, allow_patterns))
        if repo_id == "org/missing":
            raise OSError("404 not found")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fake_download)
    assert read_config("org/adapter").r == 3
    adapter = ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"]
    assert asked[0][1] == [*adapter, "pytorch_lora_weights.safetensors"]
    with pytest.raises(AdapterFileError, match="404 not found"):
        read_config("org/missing")


def test_safetensors_come_before_pickles(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_model.bin").write_bytes(b"garbage")
    assert read_tensors(tmp_path).keys() == load_file(tmp_path / "adapter_model.safetensors").keys()


VARIANTS = [
    {"peft_type": "LORA"},
    {"peft_type": "LORA", "use_dora": True},
    {"peft_type": "IA3"},
    {"peft_type": "IA3", "feedforward_modules": ["c_fc"]},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize(("model", "module", "stored_transposed"), [("gpt2", "c_fc", True), ("llama", "q_proj", False)])
def test_fan_in_fan_out_says_how_the_weights_are_stored_whichever_variant_was_chosen(
    options, model, module, stored_transposed
):
    if "feedforward_modules" in options:
        options = {**options, "feedforward_modules": [module]}
    config = get_config(options["peft_type"]).from_dict({**options, "target_modules": [module]})
    plan = make_plan(table_of(model), "default", config)
    assert file_config(config, plan).fan_in_fan_out is stored_transposed
