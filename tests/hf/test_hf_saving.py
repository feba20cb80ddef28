"""What `save_pretrained` refuses before it writes anything, and what a load that is refused leaves as it was."""

import re

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import build
from torch import nn

import peft_fx
from peft_fx.errors import AdapterFileError, AdapterNameError

LORA = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False}


def made(**options):
    return peft_fx.get_peft_model(build("llama"), peft_fx.LoraConfig(**{**LORA, **options}))


# Names


NAMES = {
    "absolute": "/tmp/elsewhere",
    "separator": "a/b",
    "other separator": "a\\b",
    "above": "../up",
    "null byte": "a\0b",
    "surrogate": "a\ud800",
    "new line": "a\nb",
    "long": "a" * 300,
    "long in bytes": "ä" * 150,
}


@pytest.mark.parametrize("case", NAMES)
def test_a_name_that_is_no_folders_is_refused_wherever_one_comes_in(tmp_path, case):
    name, model = NAMES[case], made()
    model.save_pretrained(tmp_path)
    graph = peft_fx.capture(nn.Sequential(nn.Linear(4, 4)).eval(), (torch.randn(2, 4),))
    lora = peft_fx.LoraConfig(r=2, target_modules=["0"])
    slots = peft_fx.reserve(peft_fx.apply(graph, lora), slots=2)
    other = (lora, {f"base_model.model.0.lora_{x}.weight": torch.ones(s) for x, s in (("A", (2, 4)), ("B", (4, 2)))})
    ways = [
        lambda: peft_fx.get_peft_model(build("llama"), peft_fx.LoraConfig(**LORA), name),
        lambda: model.add_adapter(name, peft_fx.LoraConfig(**LORA)),
        lambda: model.load_adapter(tmp_path, name),
        lambda: model.base_model.add_weighted_adapter(["default"], [1.0], name),
        lambda: peft_fx.PeftModel.from_pretrained(build("llama"), tmp_path, name),
        lambda: peft_fx.apply(graph, lora, name),
        lambda: peft_fx.apply(graph, {"adapters": {name: lora}}),
        lambda: peft_fx.hotswap(slots, other, name),
    ]
    for way in ways:
        with pytest.raises(AdapterNameError, match="adapter name .*(names a folder too|without a dot)") as caught:
            way()
        assert len(str(caught.value)) < 300
    assert list(model.peft_config) == ["default"]


# Cards


CARDS = {
    "no mapping": "---\n- a\n- b\n---\ntext",
    "no yaml": "---\na: [\n---\ntext",
    "tags that are none": "---\ntags: 5\n---\ntext",
    "no text": b"\xff\xfe\x00",
}


@pytest.mark.parametrize("case", CARDS)
def test_a_card_that_cannot_be_read_is_refused_before_anything_is_written(tmp_path, case):
    card, text = tmp_path / "README.md", CARDS[case]
    card.write_bytes(text if isinstance(text, bytes) else text.encode())
    model = made()
    for save in (model.save_pretrained, model.create_or_update_model_card):
        with pytest.raises(AdapterFileError, match="README.md: is no model card that can be added to"):
            save(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["README.md"]


def test_a_card_that_is_a_link_is_not_written_through(tmp_path):
    outside, folder = tmp_path / "outside.md", tmp_path / "adapter"
    outside.write_text("mine")
    folder.mkdir()
    (folder / "README.md").symlink_to(outside)
    with pytest.raises(AdapterFileError, match="outside its folder"):
        made().save_pretrained(folder)
    assert outside.read_text() == "mine" and [p.name for p in folder.iterdir()] == ["README.md"]
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to(tmp_path / "nothing.md")
    made().save_pretrained(folder)
    assert not (tmp_path / "nothing.md").exists() and not (folder / "README.md").is_symlink()


# Loads that are refused


def numbers(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def unchanged(model, before):
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def with_fault(folder, kind):
    """The embeddings are the file's own; one of the adapter's tensors does not fit, or all are missing."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(k for k in tensors if "lora_A" in k)
    if kind == "nothing":
        tensors = {k: t for k, t in tensors.items() if "lora_" not in k}
    else:
        tensors[key] = torch.ones(tensors[key].shape, dtype=torch.int32) if kind == "integers" else torch.ones(3, 3)
    save_file(tensors, path, metadata={"format": "pt"})
    return tensors


@pytest.fixture(params=["nothing", "shape", "integers"])
def misfit(request, tmp_path):
    trained = made()
    with torch.no_grad():
        trained.get_input_embeddings().weight.mul_(2)
    trained.save_pretrained(tmp_path, save_embedding_layers=True)
    return tmp_path, with_fault(tmp_path, request.param), request.param


def test_a_file_that_does_not_fit_leaves_the_embeddings_of_the_base(misfit):
    folder, tensors, kind = misfit
    base = build("llama")
    before = numbers(base)
    with pytest.raises(AdapterFileError, match="does not fit"):
        peft_fx.PeftModel.from_pretrained(base, folder)
    unchanged(base, before)
    model = made()
    before = numbers(model)
    for name in ("new", "default"):
        with pytest.raises(AdapterFileError, match="does not fit"):
            model.load_adapter(folder, name)
        unchanged(model, before)
    if kind != "nothing":  # which keeps its numbers here
        with pytest.raises(AdapterFileError, match="does not fit"):
            peft_fx.set_peft_model_state_dict(model, tensors)
        unchanged(model, before)


@pytest.mark.parametrize("kind", ["missing", "left over"])
def test_a_file_that_fits_in_part_is_taken_with_a_warning_as_by_peft(tmp_path, kind):
    made().save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(k for k in tensors if "lora_B" in k)
    if kind == "missing":
        del tensors[key]
    else:
        key = "base_model.model.elsewhere.lora_B.weight"
        tensors[key] = torch.ones(2, 2)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.warns(UserWarning, match=re.escape(key)):
        fresh = peft_fx.PeftModel.from_pretrained(build("llama"), tmp_path)
    reference = peft.PeftModel.from_pretrained(build("llama"), tmp_path)
    expected, found = peft.get_peft_model_state_dict(reference), peft_fx.get_peft_model_state_dict(fresh)
    assert expected.keys() == found.keys() and all(torch.equal(t, found[k]) for k, t in expected.items())

    other = made()
    kept = {k: t.clone() for k, t in peft_fx.get_peft_model_state_dict(other).items()}
    with pytest.warns(UserWarning, match=re.escape(key)):
        result = other.load_adapter(tmp_path, "default")
    assert (result.missing_keys, result.unexpected_keys) == (([key], []) if kind == "missing" else ([], [key]))
    now = peft_fx.get_peft_model_state_dict(other)
    assert all(torch.equal(t, tensors.get(k, kept[k])) for k, t in now.items())


def test_embeddings_of_another_size_leave_the_adapter_as_it_was(tmp_path):
    trained = made()
    tensors = {k: t + 1 for k, t in peft_fx.get_peft_model_state_dict(trained, save_embedding_layers=True).items()}
    key = next(k for k in tensors if "embed_tokens" in k)
    tensors[key] = torch.ones(3, 3)
    model = made()
    before = numbers(model)
    with pytest.raises(AdapterFileError, match="embed_tokens"):
        peft_fx.set_peft_model_state_dict(model, tensors)
    unchanged(model, before)


def test_what_fits_in_part_but_not_in_kind_leaves_no_adapter_behind(tmp_path):
    """ignore_mismatched_sizes is for sizes: integers are refused, after the adapter was made."""
    made().save_pretrained(tmp_path)
    with_fault(tmp_path, "integers")
    model, base = made(), build("llama")
    before, parts = numbers(model), [name for name, _ in base.named_modules()]
    with pytest.raises(AdapterFileError, match="floating-point"):
        model.load_adapter(tmp_path, "new", ignore_mismatched_sizes=True)
    unchanged(model, before)
    assert list(model.peft_config) == ["default"]
    with pytest.raises(AdapterFileError, match="floating-point"):
        peft_fx.PeftModel.from_pretrained(base, tmp_path, ignore_mismatched_sizes=True)
    assert [name for name, _ in base.named_modules()] == parts
    peft_fx.get_peft_model(base, peft_fx.LoraConfig(**LORA))  # nobody has adapted it
