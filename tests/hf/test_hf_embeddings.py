"""Embeddings and heads in adapter files: written when PEFT writes them, under its keys, and loaded into the base."""

import functools
import warnings

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny import build
from torch import nn

import peft_fx
from peft_fx.engine.filing import adapter_files
from peft_fx.errors import AdapterFileError
from peft_fx.files.read import read_config, read_tensors
from peft_fx.files.write import write_adapter
from peft_fx.hf.files.embeddings import embedding_tensors, loaded_embeddings


@pytest.fixture(scope="module")
def base_of(tmp_path_factory):
    """Name -> folder of the base model, as it was before it got tokens."""

    @functools.cache
    def folder(name):
        build(name).save_pretrained(path := tmp_path_factory.mktemp(name))
        return path

    return folder


def loaded(folder, name, size=None):
    cls = transformers.AutoModelForSeq2SeqLM if name == "t5" else transformers.AutoModelForCausalLM
    model = cls.from_pretrained(folder)
    if size:
        torch.manual_seed(size)
        model.resize_token_embeddings(size, mean_resizing=False)
    return model


def adapted(library, base, **config):
    torch.manual_seed(5)
    options = {"r": 2, "init_lora_weights": False, "task_type": "CAUSAL_LM", **config}
    return library.get_peft_model(base, library.LoraConfig(**options))


def save(model, folder, mode="auto"):
    """What save_pretrained is to do: the adapter's tensors, and those of the embeddings."""
    config, own = adapter_files(model.base_model.backend.adapters, "default")
    return write_adapter(folder, config, embedding_tensors(model.base_model, "default", mode) | own)


def load(base, folder):
    """What from_pretrained is to do."""
    config = read_config(folder)
    with loaded_embeddings(base, config, read_tensors(folder), str(folder)) as own:
        return peft_fx.PeftModel(base, config, source=(own, str(folder)), trainable=False).eval()


def warned(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call()
    return result, [str(w.message) for w in caught if "mbedding" in str(w.message) or "vocab" in str(w.message)]


EMBED, HEAD, REGEX = ["embed_tokens", "q_proj"], ["lm_head", "q_proj"], r".*\.(embed_tokens|q_proj)"
# model, new size of the vocabulary, save_embedding_layers, config
CASES = {
    "as it was": ("llama", None, "auto", {}),
    "forced": ("llama", None, True, {}),
    "forced off": ("llama", 34, False, {"target_modules": EMBED}),
    "embedding adapted": ("llama", None, "auto", {"target_modules": EMBED}),
    "head adapted": ("llama", None, "auto", {"target_modules": HEAD}),
    "by regex": ("llama", None, "auto", {"target_modules": REGEX}),
    "all linear": ("llama", None, "auto", {"target_modules": "all-linear"}),
    "tied, adapted": ("tied_llama", None, "auto", {"target_modules": EMBED}),
    "tied, both adapted": ("tied_llama", None, "auto", {"target_modules": [*EMBED, "lm_head"], "ensure_weight_tying": True}),
    "resized": ("llama", 34, "auto", {}),
    "tied, resized": ("tied_llama", 34, "auto", {}),
    "resized and adapted": ("llama", 34, "auto", {"target_modules": EMBED}),
    "tokens": ("llama", None, "auto", {"trainable_token_indices": [1, 2]}),
    "new tokens": ("llama", 34, "auto", {"trainable_token_indices": [32, 33]}),
    "tokens of the head, embedding adapted": ("llama", None, "auto", {"target_modules": EMBED, "trainable_token_indices": {"lm_head": [1]}}),
    "other names": ("t5", None, "auto", {"target_modules": ["shared", "q"], "task_type": "SEQ_2_SEQ_LM"}),
    "other names, forced": ("t5", None, True, {"target_modules": ["shared", "q"], "task_type": "SEQ_2_SEQ_LM"}),
    "other names, resized": ("t5", 34, "auto", {"task_type": "SEQ_2_SEQ_LM"}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_same_keys_for_the_same_reason_as_in_peft(tmp_path, base_of, case):
    name, size, mode, config = CASES[case]
    theirs, ours = (adapted(lib, loaded(base_of(name), name, size), **config) for lib in (peft, peft_fx))
    _, expected = warned(lambda: theirs.save_pretrained(tmp_path / "peft", save_embedding_layers=mode))
    _, found = warned(lambda: save(ours, tmp_path / "ours", mode))
    assert found == expected
    a, b = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("peft", "ours"))
    assert {k: t.shape for k, t in a.items()} == {k: t.shape for k, t in b.items()}
    for key in b:
        if "lora" not in key and "delta" not in key:
            torch.testing.assert_close(a[key], b[key])


def logits(model, name="llama", size=34):
    ids = torch.arange(size - 8, size).view(2, 4)
    more = {"decoder_input_ids": ids} if name == "t5" else {}
    return model(input_ids=ids, **more).logits


ROUND = ["resized", "tied, resized", "resized and adapted", "new tokens", "embedding adapted", "tied, both adapted",
         "other names, resized"]  # fmt: skip


@pytest.mark.parametrize("case", ROUND)
def test_files_of_either_are_loaded_into_the_base_by_both(tmp_path, base_of, case):
    name, size, mode, config = CASES[case]
    for writer in ("peft", "ours"):
        base = loaded(base_of(name), name, size)
        with torch.no_grad():
            base.get_input_embeddings().weight.mul_(1.5)  # trained before, as if on its own
        folder = tmp_path / writer
        if writer == "peft":
            model = adapted(peft, base, **config).eval()
            model.save_pretrained(folder, save_embedding_layers=mode)
        else:
            model = adapted(peft_fx, base, **config).eval()
            save(model, folder, mode)
        expected = logits(model, name, size or 32)
        fresh = [loaded(base_of(name), name, size) for _ in range(2)]
        again = (peft.PeftModel.from_pretrained(fresh[0], folder).eval(), load(fresh[1], folder))
        for reader in again:
            torch.testing.assert_close(logits(reader, name, size or 32), expected)
        torch.testing.assert_close(*(m.get_input_embeddings().weight for m in fresh))


@pytest.mark.parametrize("both", [False, True])
def test_modules_to_save_keep_their_copy_and_the_base_its_own(tmp_path, base_of, both):
    """PEFT writes the copy twice, and the base's under original_module."""
    saved = ["embed_tokens", "lm_head"] if both else ["embed_tokens"]
    for writer in (peft, peft_fx):
        model = adapted(writer, loaded(base_of("llama"), "llama", 34), modules_to_save=saved).eval()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora" not in name:
                nn.init.normal_(parameter)
        folder = tmp_path / writer.__name__
        model.save_pretrained(folder) if writer is peft else save(model, folder)
        expected = logits(model)
        with model.disable_adapter():
            base = logits(model)
        readers = [load(loaded(base_of("llama"), "llama", 34), folder)]
        readers += [peft.PeftModel.from_pretrained(loaded(base_of("llama"), "llama", 34), folder).eval()]
        for reader in readers:
            torch.testing.assert_close(logits(reader), expected)
            with reader.disable_adapter():
                torch.testing.assert_close(logits(reader), base)
    keys = load_file(tmp_path / "peft_fx" / "adapter_model.safetensors").keys()
    assert keys <= load_file(tmp_path / "peft" / "adapter_model.safetensors").keys()


def test_merged_embeddings_are_written_as_they_were(tmp_path, base_of):
    model = adapted(peft_fx, loaded(base_of("llama"), "llama"), target_modules=EMBED)
    before = embedding_tensors(model.base_model, "default")
    before = {k: t.clone() for k, t in before.items()}
    model.base_model.merge_adapter()
    after = embedding_tensors(model.base_model, "default")
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_a_base_that_cannot_be_had_is_taken_as_unchanged(base_of):
    base = loaded(base_of("llama"), "llama", 34)
    base.name_or_path = base.config._name_or_path = "nobody/nothing"
    model = adapted(peft_fx, base)
    found, messages = warned(lambda: embedding_tensors(model.base_model, "default"))
    assert not found and messages == [
        "Could not find a config file in nobody/nothing - will assume that the vocabulary was not modified."
    ]
    base.name_or_path = base.config._name_or_path = ""
    model = adapted(peft_fx, build("llama"))
    assert warned(lambda: embedding_tensors(model.base_model, "default")) == ({}, [])


def test_a_model_that_is_not_transformers(tmp_path):
    model = peft_fx.get_peft_model(nn.Sequential(nn.Linear(4, 4)), peft_fx.LoraConfig(target_modules=["0"]))
    save(model, tmp_path)
    load(nn.Sequential(nn.Linear(4, 4)), tmp_path)
    assert warned(lambda: embedding_tensors(model.base_model, "default")) == ({}, [])
    found, (message,) = warned(lambda: embedding_tensors(model.base_model, "default", True))
    assert not found and "not a 🤗 transformers model" in message


def test_another_size_is_refused_and_changes_nothing(tmp_path, base_of):
    model = adapted(peft_fx, loaded(base_of("llama"), "llama", 34))
    save(model, tmp_path)
    base = loaded(base_of("llama"), "llama")
    before = base.get_input_embeddings().weight.clone()
    with pytest.raises(
        AdapterFileError, match=r"embed_tokens.weight: expected shape .32, 16., got .34, 16..*resize_token"
    ):
        load(base, tmp_path)
    assert torch.equal(base.get_input_embeddings().weight, before)
