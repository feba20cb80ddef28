"""Numbers of adapters and of the base by name (PEFT's functions on state dicts), as PEFT gives and sets them."""

import peft
import pytest
import torch
from beside_peft import LORA, both, logits
from graphs import model_of
from safetensors.torch import load_file, save_file
from torch import nn

import peft_fx
from peft_fx import functional, helpers, utils


def test_weights_are_loaded_as_by_peft(tmp_path):
    both(tmp_path, adapters=("default", "other"))
    mapping = {r"layers\.(\d+)": r"blocks.\1", "self_attn": "never"}
    for options in ({}, {"device": "cpu"}, {"subfolder": "other"}, {"key_mapping": mapping}):
        found, expected = (library.load_peft_weights(str(tmp_path), **options) for library in (peft_fx, peft))
        assert found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in found)
    with pytest.raises(peft_fx.AdapterFileError):
        peft_fx.load_peft_weights(str(tmp_path / "nowhere"))


def test_the_models_own_weights_have_its_own_names(tmp_path):
    reference, model = both(tmp_path, modules_to_save=["lm_head"])
    found, expected = (library.get_base_model_state_dict(m) for library, m in ((peft_fx, model), (peft, reference)))
    assert found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in found)
    other = {k: 2 * t for k, t in found.items()}
    for library, m in ((peft, reference), (peft_fx, model)):
        result = library.set_base_model_state_dict(m, other)
        assert (list(result.missing_keys), list(result.unexpected_keys)) == ([], [])
        some = {**dict(list(other.items())[1:]), "more": torch.ones(1)}
        result = library.set_base_model_state_dict(m, some, strict=False)
        assert (list(result.missing_keys), list(result.unexpected_keys)) == ([next(iter(other))], ["more"])
        with pytest.raises(RuntimeError, match="more"):
            library.set_base_model_state_dict(m, some)
    torch.testing.assert_close(logits(model), logits(reference))
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        peft_fx.set_base_model_state_dict(model, found)


def differ(found, expected):
    return [k for k in found.keys() | expected.keys() if not torch.equal(found[k], expected[k])]


def test_an_adapters_numbers_are_set_as_by_peft(tmp_path):
    reference, model = both(tmp_path, modules_to_save=["lm_head"])
    start = peft.get_peft_model_state_dict(reference)
    lora = [k for k in start if "lora_" in k]
    new = {k: torch.full_like(t, 0.1 * i) for i, (k, t) in enumerate(start.items())}
    cases = {
        "whole": new,
        "without one": {k: t for k, t in new.items() if k != lora[0]},
        "with one more": new | {"base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": torch.ones(4, 16)},
        "with a strange one": new | {"nothing.of.ours": torch.ones(1)},
    }
    for numbers in cases.values():
        results = []
        for library, m in ((peft, reference), (peft_fx, model)):
            library.set_peft_model_state_dict(m, start)
            result = library.set_peft_model_state_dict(m, numbers)
            adapter = [k.replace(".default", "") for k in result.missing_keys if "lora_" in k]
            results.append((sorted(adapter), [k.replace(".default", "") for k in result.unexpected_keys]))
            assert numbers.keys() == {*numbers}, "the caller's dict is as it was"
        assert results[0] == results[1]
        assert not differ(peft_fx.get_peft_model_state_dict(model), peft.get_peft_model_state_dict(reference))


def test_sizes_that_do_not_fit(tmp_path):
    reference, model = both(tmp_path)
    start = peft.get_peft_model_state_dict(reference)
    key, *others = start
    new = {k: t + 1 for k, t in start.items()} | {key: torch.ones(1, 16)}
    for library, m in ((peft, reference), (peft_fx, model)):
        with pytest.raises((RuntimeError, peft_fx.AdapterFileError), match=r"shape"):
            library.set_peft_model_state_dict(m, new)
        with pytest.warns(UserWarning, match="shape"):
            result = library.set_peft_model_state_dict(m, new, ignore_mismatched_sizes=True)
        assert key in [k.replace(".default", "") for k in result.missing_keys]
        kept = library.get_peft_model_state_dict(m)
        assert torch.equal(kept[key], start[key]) and all(torch.equal(kept[k], new[k]) for k in others)
    with pytest.raises(ValueError, match="nowhere"):
        peft_fx.set_peft_model_state_dict(model, start, "nowhere")


def test_numbers_from_a_state_dict(tmp_path):
    reference, model = both(tmp_path, adapters=("default", "other"), modules_to_save=["lm_head"])
    found, expected = [], []
    for library, m, results in ((peft_fx, model, found), (peft, reference, expected)):
        kept = {k: t.clone() for k, t in m.state_dict().items()}
        with torch.no_grad():
            for p in m.parameters():
                p.zero_()
        for name in ("default", "other"):
            results.append(library.get_peft_model_state_dict(m, state_dict=kept, adapter_name=name))
            assert not any(t.any() for t in library.get_peft_model_state_dict(m, adapter_name=name).values())
    for a, b in zip(found, expected, strict=True):
        assert not differ(a, b) and any(t.any() for t in a.values())
    with pytest.raises(ValueError, match="no key that begins with"):
        peft_fx.get_peft_model_state_dict(model, state_dict={})


def test_a_state_dict_is_what_is_saved(tmp_path):
    """As gathered from shards, whole or in half precision."""
    reference, model = both(tmp_path, modules_to_save=["lm_head"])
    for library, m in ((peft, reference), (peft_fx, model)):
        state = {k: (2 * t).to(torch.bfloat16) for k, t in m.state_dict().items()}
        m.save_pretrained(tmp_path / library.__name__, state_dict=state)
    theirs, ours = (load_file(tmp_path / lib / "adapter_model.safetensors") for lib in ("peft", "peft_fx"))
    assert not differ(ours, theirs) and {t.dtype for t in ours.values()} == {torch.bfloat16}
    with pytest.raises(ValueError, match="no key that begins with"):
        model.save_pretrained(tmp_path / "nowhere", state_dict=nn.Linear(1, 1).state_dict())
    assert not (tmp_path / "nowhere").exists()


def test_bare_pieces_of_a_tensor_are_set(tmp_path):
    """AdaMSS files a tensor per cluster: what is left out stays."""
    config = peft_fx.AdamssConfig(r=4, num_subspaces=2, subspace_rank=1, target_modules=["q_proj"])
    model = peft_fx.get_peft_model(model_of("llama"), config)
    start = {k: t.clone() for k, t in peft_fx.get_peft_model_state_dict(model).items()}
    key = next(k for k, t in start.items() if t.is_floating_point() and t.numel() and "adamss_" in k)
    result = peft_fx.set_peft_model_state_dict(model, {key: start[key] + 1})
    now = peft_fx.get_peft_model_state_dict(model)
    assert differ(now, start) == [key] and sorted(result.missing_keys) == sorted(start.keys() - {key})


def test_embeddings_go_along_as_in_peft(tmp_path):
    reference, model = both(tmp_path)
    for option in (True, False, "auto"):
        found, expected = (
            library.get_peft_model_state_dict(m, save_embedding_layers=option)
            for library, m in ((peft_fx, model), (peft, reference))
        )
        assert not differ(found, expected)
    new = {k: t + 1 for k, t in peft.get_peft_model_state_dict(reference, save_embedding_layers=True).items()}
    for library, m in ((peft, reference), (peft_fx, model)):
        result = library.set_peft_model_state_dict(m, new)
        assert list(result.unexpected_keys) == []
    torch.testing.assert_close(logits(model), logits(reference))


def test_a_model_that_adapters_were_injected_into(tmp_path):
    """Its keys have no base_model.model. in front."""
    both(tmp_path)
    models = []
    for library in (peft, peft_fx):
        models.append(library.inject_adapter_in_model(library.LoraConfig(**LORA), model_of("biased_llama")).eval())
        result = library.set_peft_model_state_dict(models[-1], library.load_peft_weights(str(tmp_path)))
        assert list(result.unexpected_keys) == [] and not any("lora_" in k for k in result.missing_keys)
    reference, model = models
    torch.testing.assert_close(logits(model), logits(reference))
    found, expected = (library.get_peft_model_state_dict(m) for library, m in ((peft_fx, model), (peft, reference)))
    assert not differ(found, expected) and not any(k.startswith("base_model") for k in found)
    results = []
    for library, m in ((peft, reference), (peft_fx, model)):
        some = dict(list(expected.items())[1:])
        missing = library.set_peft_model_state_dict(m, some).missing_keys
        status = library.get_model_status(m)
        results.append((
            [k.replace(".default", "") for k in missing if "lora_" in k], status.adapter_model_type, status.base_model_type,
            status.trainable_params, sorted(r.name for r in library.get_layer_status(m)),
        ))  # fmt: skip
    assert results[0] == results[1]
    kept = {k: t.clone() for k, t in model.state_dict().items()}
    functional.set_requires_grad(model, "default", False)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert not differ(peft_fx.get_peft_model_state_dict(model, state_dict=kept), expected)
    with helpers.rescale_adapter_scale(model, 2):
        assert logits(model).isfinite().all()


def test_files_without_safetensors(tmp_path):
    """What PEFT wrote before safetensors is read as tensors only."""
    _, model = both(tmp_path)
    tensors = peft_fx.get_peft_model_state_dict(model)
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save(tensors, tmp_path / utils.WEIGHTS_NAME)
    assert not differ(peft_fx.load_peft_weights(tmp_path), tensors)
    save_file(tensors, tmp_path / utils.SAFETENSORS_WEIGHTS_NAME)
    assert not differ(peft_fx.load_peft_weights(tmp_path), tensors)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_that_an_adapter_without_them_is_given_are_the_bases(bias):
    # whoever trained them hands them on to an adapter that has none of its own, as PEFT's numbers do
    options = {"target_modules": ["0"], "init_lora_weights": False}
    source = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3))
    trained = peft_fx.get_peft_model(source, peft_fx.LoraConfig(**options, bias=bias)).eval()
    with torch.no_grad():
        for layer in (source[0], source[1]) if bias == "all" else (source[0],):
            layer.bias.fill_(1.25)
    x = torch.ones(2, 8)
    numbers = peft_fx.get_peft_model_state_dict(trained)
    results = []
    for library in (peft, peft_fx):
        model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3))
        model.load_state_dict(peft_fx.get_base_model_state_dict(trained))
        model = library.get_peft_model(model, library.LoraConfig(**options)).eval()
        assert not library.set_peft_model_state_dict(model, numbers).unexpected_keys
        results.append(model(x))
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[1], trained(x))


def test_a_state_dict_that_does_not_fit_leaves_the_bases_numbers():
    model = peft_fx.get_peft_model(nn.Sequential(nn.Linear(8, 6)), peft_fx.LoraConfig(target_modules=["0"]))
    before = {k: t.clone() for k, t in model.state_dict().items()}
    prefix = "base_model.model.0."
    numbers = {f"{prefix}base_layer.bias": torch.ones(6), f"{prefix}lora_A.weight": torch.ones(1, 1)}
    with pytest.raises(peft_fx.AdapterFileError, match="lora_A"):
        peft_fx.set_peft_model_state_dict(model, numbers)
    result = peft_fx.set_peft_model_state_dict(model, {f"{prefix}base_layer.bias": torch.ones(5)})
    assert result.unexpected_keys == [f"{prefix}base_layer.bias"]
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
