"""What goes to the Hub: the model card, the versions, and the files of a push. Nothing leaves this machine."""

import copy
import json
import warnings
from importlib.metadata import version
from pathlib import Path

import huggingface_hub
import peft
import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import LocalEntryNotFoundError
from packaging.version import Version
from safetensors import safe_open
from tiny import build

import peft_fx
from peft_fx.hf.files.card import is_hub_id
from peft_fx.hf.files.hub import push_to_hub

BASE = "someone/tiny-llama"
LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"]}


def named(model="tied_llama", name=BASE):
    base = build(model)
    base.name_or_path = base.config._name_or_path = name
    return base


def saved(library, folder, base=None, peft_type="LORA", **config):
    """The folder that a library writes for a model of one adapter."""
    made = {"LORA": library.LoraConfig, "LOHA": library.LoHaConfig}[peft_type](**{**LORA, **config})
    model = library.get_peft_model(named() if base is None else base, made)
    model.save_pretrained(folder)
    return folder


def header(folder):
    return ModelCard.load(folder / "README.md").data.to_dict()


# The card

CONFIGS = {
    "causal": {"task_type": "CAUSAL_LM"},
    "no task": {},
    "features": {"task_type": "FEATURE_EXTRACTION"},
}


@pytest.mark.parametrize("case", CONFIGS)
def test_the_cards_header_is_pefts(tmp_path, case):
    expected, found = (header(saved(lib, tmp_path / lib.__name__, **CONFIGS[case])) for lib in (peft, peft_fx))
    assert found == expected
    assert (
        found["library_name"] == "peft"
        and found["base_model"] == BASE
        and f"base_model:adapter:{BASE}" in found["tags"]
    )
    assert found.get("pipeline_tag") == ("text-generation" if case == "causal" else None)


def test_the_tags_name_any_method_and_what_the_model_is_tagged_with(tmp_path):
    """PEFT names LoRA only."""
    base = named()
    base.add_model_tags(["sft"])
    expected = set(header(saved(peft, tmp_path / "peft", copy.deepcopy(base), "LOHA"))["tags"])
    assert set(header(saved(peft_fx, tmp_path / "ours", base, "LOHA"))["tags"]) == {*expected, "loha"} >= {"sft"}


@pytest.mark.parametrize("name", ["", "/home/me/model", "a/b/c", "tests"])
def test_a_base_that_the_hub_does_not_know_is_not_in_the_card(tmp_path, name):
    """The Hub refuses a card whose base_model is no id of its own; "tests" is a folder here."""
    found = header(saved(peft_fx, tmp_path, named(name=name)))
    assert "base_model" not in found and not any("base_model" in tag for tag in found["tags"])
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == (name or None)


def test_hub_ids():
    assert is_hub_id("gpt2") and is_hub_id("meta-llama/Llama-2-7b-hf") and not is_hub_id("../x") and not is_hub_id("/x")


WRITTEN = """---
license: mit
tags:
- mine
pipeline_tag: summarization
---

# My adapter

- PEFT makes it small.

### Framework versions

- PEFT 0.3.9
- Transformers 5.0
"""


def test_a_card_that_is_there_keeps_its_text_and_gets_the_versions(tmp_path):
    (tmp_path / "README.md").write_text(WRITTEN)
    for _ in range(2):
        saved(peft_fx, tmp_path, task_type="CAUSAL_LM")
    card = ModelCard.load(tmp_path / "README.md")
    own = f"- peft_fx {version('peft-fx')}"
    expected = ["### Framework versions", "", f"- PEFT {peft.__version__}", own, "- Transformers 5.0"]
    assert card.text.splitlines()[-5:] == expected
    assert "# My adapter" in card.text and "- PEFT makes it small." in card.text and "0.3.9" not in card.text
    found = card.data.to_dict()
    assert found["license"] == "mit" and "mine" in found["tags"] and found["pipeline_tag"] == "summarization"


def test_peft_writes_its_card_over_ours_and_ours_stays(tmp_path):
    saved(peft_fx, tmp_path, task_type="CAUSAL_LM")
    before = ModelCard.load(tmp_path / "README.md")
    saved(peft, tmp_path, task_type="CAUSAL_LM")
    after = ModelCard.load(tmp_path / "README.md")
    assert after.text.split() == before.text.split() and after.data.to_dict() == before.data.to_dict()


# The versions


def test_versions_are_recorded_and_peft_reads_the_config_without_a_warning(tmp_path):
    saved(peft_fx, tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt" and Version(file.metadata()["peft_fx"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = peft.PeftConfig.from_pretrained(tmp_path)
    assert Version(config.peft_version) == Version(peft.__version__)
    mine, theirs = (
        json.loads((f / "adapter_config.json").read_text()) for f in (tmp_path, saved(peft, tmp_path / "peft"))
    )
    unordered = {"target_modules": sorted(theirs["target_modules"])}
    assert mine | unordered == theirs | unordered and sorted(mine["target_modules"]) == unordered["target_modules"]
    assert mine["auto_mapping"]["base_model_class"] == "LlamaForCausalLM"


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_auto_classes_find_the_base(tmp_path, task):
    base = build("llama").eval()
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = base.config._name_or_path = str(tmp_path / "base")
    config = peft_fx.LoraConfig(**LORA, task_type=task, init_lora_weights=False)
    model = peft_fx.get_peft_model(base, config).eval()
    model.save_pretrained(tmp_path / "adapter")
    ids = torch.arange(8).view(2, 4)
    for library in (peft, peft_fx):
        auto = library.AutoPeftModelForCausalLM if task else library.AutoPeftModel
        again = auto.from_pretrained(tmp_path / "adapter").eval()
        torch.testing.assert_close(again(input_ids=ids).logits, model(input_ids=ids).logits)


def test_equal_adapters_are_equal_files(tmp_path):
    model = peft_fx.get_peft_model(named(), peft_fx.LoraConfig(**LORA))
    for i in range(8):
        model.save_pretrained(tmp_path / str(i))
    assert len({(tmp_path / str(i) / "adapter_model.safetensors").read_bytes() for i in range(8)}) == 1


DEFAULTS = {"llama": ["q_proj", "v_proj"], "t5": ["q", "v"], "gpt2": ["c_attn"], "bert": ["query", "value"]}


@pytest.mark.parametrize("model", DEFAULTS)
def test_default_targets_are_written_out_as_in_peft(tmp_path, model):
    for library in (peft, peft_fx):
        folder = saved(library, tmp_path / library.__name__, build(model), target_modules=None)
        assert sorted(json.loads((folder / "adapter_config.json").read_text())["target_modules"]) == DEFAULTS[model]
        for reader in (peft, peft_fx):
            reader.PeftModel.from_pretrained(build(model), folder)


def test_default_targets_that_are_a_regex_stay_default_beside_layers(tmp_path):
    """With a regex for target_modules the config could not be read again."""
    base = build("llama")
    base.config.model_type = "gemma4"
    inner, base.model = base.model, torch.nn.Module()
    base.model.language_model = inner  # as in models for text and images
    for layers, expected in ((None, r".*language_model\..*\.(q_proj|v_proj)"), ([0], None)):
        model = peft_fx.get_peft_model(copy.deepcopy(base), peft_fx.LoraConfig(r=2, layers_to_transform=layers))
        model.save_pretrained(tmp_path)
        assert peft_fx.PeftConfig.from_pretrained(tmp_path).target_modules == expected


# The push


class Hub:
    """Takes the calls that would go out; `files` is the repository."""

    def __init__(self, monkeypatch, files=()):
        self.files, self.calls = dict(files), []
        for name in ("create_repo", "create_branch", "create_commit", "upload_folder"):
            monkeypatch.setattr(huggingface_hub.HfApi, name, getattr(self, name))
        monkeypatch.setattr(ModelCard, "load", self.load(ModelCard.load))

    def create_repo(self, repo_id, **options):
        self.calls.append(("create_repo", repo_id, options))
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def create_branch(self, **options):
        self.calls.append(("create_branch", options["repo_id"], options))

    def create_commit(self, **options):
        self.calls.append(("create_commit", options["repo_id"], options))
        for operation in options["operations"]:
            with operation.as_file() as file:
                self.files[operation.path_in_repo] = file.read()

    def upload_folder(self, *, folder_path, **options):
        self.calls.append(("upload_folder", options["repo_id"], options))
        folder = Path(folder_path)
        self.files |= {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    def load(self, original):
        def load(repo_id_or_path, **options):
            if repo_id_or_path != "user/x":
                return original(repo_id_or_path, **options)
            if "README.md" not in self.files:
                raise LocalEntryNotFoundError("no card")
            return ModelCard(self.files["README.md"].decode())

        return load


ADAPTER_FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.parametrize(
    "push", [push_to_hub, lambda model, *a, **k: model.push_to_hub(*a, **k)], ids=["ours", "method"]
)
def test_a_push_uploads_the_adapter_and_its_card_and_no_base_weights(monkeypatch, push):
    hub = Hub(monkeypatch)
    model = peft_fx.get_peft_model(named(), peft_fx.LoraConfig(**LORA, task_type="CAUSAL_LM"))
    model.add_adapter("second", peft_fx.LoraConfig(**LORA))
    push(model, "user/x", commit_message="first", private=True)
    assert set(hub.files) == {*ADAPTER_FILES, *(f"second/{n}" for n in ADAPTER_FILES - {"README.md"})}
    assert len(hub.files["adapter_model.safetensors"]) < 8000
    assert hub.calls[0][1:] == ("user/x", {"private": True, "token": None, "exist_ok": True})
    assert hub.calls[-1][2]["commit_message"] == "first"


def test_a_pushed_card_is_ours_and_one_that_was_there_keeps_its_text(monkeypatch):
    hub = Hub(monkeypatch)
    model = peft_fx.get_peft_model(named(), peft_fx.LoraConfig(**LORA, task_type="CAUSAL_LM"))
    push_to_hub(model, "user/x", tags=["tiny"], revision="next")
    card = ModelCard(hub.files["README.md"].decode())
    assert card.data.library_name == "peft" and {"tiny", "lora"} <= set(card.data.tags) and card.data.base_model == BASE
    assert [name for name, *_ in hub.calls] == ["create_repo", "create_branch", "upload_folder"]
    hub.files["README.md"] = WRITTEN.encode()
    push_to_hub(model, "user/x")
    card = ModelCard(hub.files["README.md"].decode())
    assert "# My adapter" in card.text and card.data.library_name == "peft" and "mine" in card.data.tags
