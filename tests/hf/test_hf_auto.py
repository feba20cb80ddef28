"""AutoPeftModelFor...: what is asked of the Hub for the adapter, for its base and for a tokenizer, and whose classes are taken."""

import json

import pytest
import torch
import transformers
from graphs import model_of
from huggingface_hub.errors import EntryNotFoundError
from words import tokenizer

import peft_fx
from peft_fx.hf.files import auto

pytestmark = pytest.mark.slow

LORA = {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """(folder of the repository org/adapter, what was asked for: (what, revision, token)). The base has revision b0."""
    folder, asked = tmp_path / "adapter", []
    base = model_of("tied_llama")
    config = peft_fx.LoraConfig(
        task_type="CAUSAL_LM", base_model_name_or_path="org/base", revision="b0", **LORA
    )  # fmt: skip
    peft_fx.get_peft_model(base, config).save_pretrained(folder / "inside")

    def ask(what, revision=None, token=None, **others):
        asked.append((what, revision, token))

    def snapshot(repo_id, allow_patterns, **hub):
        ask(repo_id, **hub)
        assert all(pattern.startswith("inside/") for pattern in allow_patterns)
        return str(folder)

    def one_file(repo_id, filename, subfolder, **hub):
        ask(filename, **hub)
        if not (folder / subfolder / filename).exists():
            raise EntryNotFoundError(filename)
        return str(folder / subfolder / filename)

    def load(kind, source, subfolder="", trust_remote_code=False, **hub):
        ask(source, **hub)
        if kind == "tokenizer":
            return transformers.PreTrainedTokenizerFast.from_pretrained(folder / subfolder)
        return model_of("tied_llama")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    monkeypatch.setattr(auto, "hf_hub_download", one_file)
    for kind, cls in (("tokenizer", transformers.AutoTokenizer), ("model", transformers.AutoModelForCausalLM)):
        monkeypatch.setattr(cls, "from_pretrained", lambda source, kind=kind, **options: load(kind, source, **options))
    return folder, asked


def loaded(**options):
    options = {"revision": "a0", "token": "secret", "subfolder": "inside", **options}
    return peft_fx.AutoPeftModelForCausalLM.from_pretrained("org/adapter", **options)


def test_adapter_and_base_have_revisions_of_their_own(hub):
    found = loaded()
    assert set(hub[1]) == {
        ("org/adapter", "a0", "secret"), ("org/base", "b0", "secret"), ("tokenizer_config.json", "a0", "secret"),
    }  # fmt: skip
    assert found.peft_config["default"].r == 4 and found.get_input_embeddings().num_embeddings == 32


def test_a_tokenizer_with_more_tokens_makes_the_embedding_larger(hub):
    more = tokenizer("<s> $A")
    more.add_tokens([f"new{i}" for i in range(15)])
    more.save_pretrained(hub[0] / "inside")
    assert loaded().get_input_embeddings().num_embeddings == len(more) > 32
    assert hub[1][-1] == ("org/adapter", "a0", "secret")


def test_a_config_is_read_from_a_revision_and_a_subfolder(hub):
    config = peft_fx.PeftConfig.from_pretrained("org/adapter", subfolder="inside", revision="a1", token="other")
    assert (config.r, config.revision) == (4, "b0") and hub[1] == [("org/adapter", "a1", "other")]


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = torch.nn.Linear(4, 4)

    @classmethod
    def from_pretrained(cls, name, revision):
        assert (name, revision) == ("somewhere", "main")
        return cls()

    def forward(self, x):
        return self.q_proj(x)


def test_a_class_of_another_package_is_taken_if_that_is_allowed(tmp_path):
    base = Net()
    peft_fx.get_peft_model(base, peft_fx.LoraConfig(base_model_name_or_path="somewhere", **LORA)).save_pretrained(
        tmp_path
    )
    with pytest.raises(
        peft_fx.AdapterFileError, match=rf"names a class of '{__name__}', which is not in import_allowlist"
    ):
        peft_fx.AutoPeftModel.from_pretrained(tmp_path)
    found = peft_fx.AutoPeftModel.from_pretrained(tmp_path, is_trainable=True, import_allowlist=[__name__])
    assert isinstance(found.get_base_model(), Net)
    found(torch.ones(1, 4)).sum().backward()


WRONG = [
    ("transformers.nothing", "LlamaModel", "names 'transformers.nothing', which is not there"),
    ("transformers", "AutoTokenizer", "'AutoTokenizer' is no model class of transformers"),
    ("transformers.utils", "logging", "'logging' is no model class"),
    ("transformersX", "Model", "which is not in import_allowlist"),
]


@pytest.mark.parametrize(("package", "name", "text"), WRONG)
def test_what_is_no_model_class_is_not_called(tmp_path, package, name, text):
    peft_fx.get_peft_model(model_of("tied_llama"), peft_fx.LoraConfig(**LORA)).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    data = json.loads(file.read_text())
    data |= {"base_model_name_or_path": "x", "auto_mapping": {"base_model_class": name, "parent_library": package}}
    file.write_text(json.dumps(data))
    with pytest.raises(peft_fx.AdapterFileError, match=text):
        peft_fx.AutoPeftModel.from_pretrained(tmp_path)
