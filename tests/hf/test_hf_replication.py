"""layer_replication in PEFT's names: the model itself becomes deeper, as with PEFT, and is what it was after `unload`."""

import copy
import json
import pickle

import peft
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

import peft_fx

pytestmark = pytest.mark.slow

RANGES = [[0, 2], [1, 2], [0, 1]]  # layers 0 1 1 0
TARGETS = {"llama": ["q_proj", "down_proj"], "bert": ["query", "intermediate.dense"]}
LIBRARIES = (peft, peft_fx)


def config_for(library, name, **options):
    options = {
        "r": 4,
        "target_modules": TARGETS[name],
        "layer_replication": RANGES,
        "init_lora_weights": False,
        **options,
    }
    return library.LoraConfig(**options)


def made(library, name="llama", **options):
    model = tiny.build(name).eval()
    torch.manual_seed(5)
    return library.get_peft_model(model, config_for(library, name, **options)).eval()


def ids_for(model):
    return torch.arange(27).view(3, 9) % model.config.vocab_size


def logits(model, **more):
    return model(input_ids=ids_for(model), **more).logits


def close(found, expected):
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def structure(model):
    """Names of the layers' modules, their places, and which parameters are one."""
    path = "model.layers" if hasattr(model, "model") else "bert.encoder.layer"
    layers = model.get_submodule(path)
    indices = [m.layer_idx for m in layers.modules() if hasattr(m, "layer_idx")]
    pointers = [p.data_ptr() for n, p in layers.named_parameters(remove_duplicate=False) if "lora_" not in n]
    return len(layers), indices, [pointers.index(p) for p in pointers], model.config.num_hidden_layers


def saved(model, folder):
    model.save_pretrained(folder)
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.fixture(scope="module", params=TARGETS)
def pair(request):
    return request.param, *[made(library, request.param) for library in LIBRARIES]


def test_the_model_outputs_and_counts_are_pefts(pair):
    _, theirs, ours = pair
    close(logits(ours), logits(theirs))
    assert structure(ours.get_base_model()) == structure(theirs.get_base_model())
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    layers = [[s.name.removeprefix("model.") for s in m.get_layer_status()] for m in (theirs, ours)]
    assert sorted(layers[0]) == sorted(layers[1])
    with ours.disable_adapter(), theirs.disable_adapter():
        close(logits(ours), logits(theirs))


def test_gradients_are_pefts(pair):
    found = []
    for library, model in zip(LIBRARIES, pair[1:], strict=True):
        logits(model).square().sum().backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        assert all(p.grad is not None for p in trained)
        gradients = {key: p.grad for key, p in by_key(library, model).items()}
        found.append(gradients)
        model.zero_grad()
    assert found[0].keys() == found[1].keys()
    for key, expected in found[0].items():
        assert torch.allclose(found[1][key], expected, rtol=1e-4, atol=1e-5 * expected.abs().max()), key


def by_key(library, model):
    """File key -> parameter."""
    tensors = library.get_peft_model_state_dict(model)
    parameters = {p.data_ptr(): p for p in model.parameters() if p.requires_grad}
    return {key: parameters[t.data_ptr()] for key, t in tensors.items()}


def test_generation_with_a_cache_is_pefts():
    found = []
    for library in LIBRARIES:
        model = made(library)
        ids = ids_for(model)
        for cached in (True, False):
            found.append(model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6,
                                        do_sample=False, pad_token_id=0, use_cache=cached))  # fmt: skip
    assert all(torch.equal(found[0], tokens) for tokens in found[1:])


def test_files_go_both_ways(pair, tmp_path):
    name, theirs, ours = pair
    for writer, folder in ((theirs, tmp_path / "theirs"), (ours, tmp_path / "ours")):
        assert saved(writer, folder)["layer_replication"] == RANGES
        for library in LIBRARIES:
            loaded = library.PeftModel.from_pretrained(tiny.build(name).eval(), folder)
            close(logits(loaded), logits(theirs))
    again = peft_fx.PeftModel.from_pretrained(tiny.build(name).eval(), tmp_path / "ours")
    again.load_adapter(tmp_path / "theirs", "default")  # the numbers once more
    close(logits(again), logits(theirs))


def test_a_second_adapter_is_one_of_the_deeper_model(tmp_path):
    models = [made(library) for library in LIBRARIES]
    for library, model in zip(LIBRARIES, models, strict=True):
        torch.manual_seed(6)
        model.add_adapter("second", config_for(library, "llama", layer_replication=None))
        model.set_adapter("second")
    close(logits(models[1]), logits(models[0]))
    models[1].save_pretrained(tmp_path)
    loaded = peft_fx.PeftModel.from_pretrained(tiny.build("llama").eval(), tmp_path)
    loaded.load_adapter(tmp_path / "second", "second")
    loaded.set_adapter("second")
    close(logits(loaded), logits(models[0]))


def test_rows_of_a_batch_and_combinations_are_right():
    model = made(peft_fx)
    model.add_adapter("second", config_for(peft_fx, "llama", layer_replication=None))
    model.base_model.add_weighted_adapter(["default", "second"], [1.0, 0.5], "both", combination_type="cat")
    alone = []
    for name in ("default", "second", "both"):
        model.set_adapter(name)
        alone.append(logits(model))
    mixed = logits(model, adapter_names=["default", "second", "both"])
    for row, expected in enumerate(alone):
        close(mixed[row], expected[row])


def test_only_the_first_adapter_can_ask_for_it(tmp_path):
    shallow = made(peft_fx, layer_replication=None)
    deeper = made(peft_fx)
    deeper.save_pretrained(tmp_path)
    for model in (shallow, deeper):
        before = logits(model)
        with pytest.raises(peft_fx.RecipeError, match="first adapter"):
            model.add_adapter("second", config_for(peft_fx, "llama"))
        with pytest.raises(peft_fx.RecipeError, match="first adapter"):
            model.load_adapter(tmp_path, "second")
        assert torch.equal(logits(model), before)
        with pytest.raises(peft_fx.RecipeError, match="unload"):
            peft_fx.get_peft_model(model.get_base_model(), config_for(peft_fx, "llama"))
        assert torch.equal(logits(model), before)


def test_merging_is_refused_and_a_graph_can_be_merged(pair):
    _, theirs, ours = pair
    with pytest.raises(peft_fx.MergeError, match="untie=True"):
        ours.merge_adapter()
    with pytest.raises(ValueError, match="replicated"):
        ours.merge_and_unload()
    close(logits(ours), logits(theirs))
    inputs = {"input_ids": ids_for(ours), "attention_mask": torch.ones_like(ids_for(ours))}
    merged = peft_fx.merge(ours.to_graph(), untie=True)
    close(merged(**inputs).logits, logits(theirs))


def test_unload_gives_the_original_model_back(pair):
    name = pair[0]
    model = tiny.build(name).eval()
    expected, before = logits(model), structure(model)
    tuned = peft_fx.get_peft_model(model, config_for(peft_fx, name))
    assert structure(model) != before
    assert tuned.unload() is model
    assert structure(model) == before
    assert torch.equal(logits(model), expected)
    again = peft_fx.get_peft_model(model, config_for(peft_fx, name))
    assert structure(again.get_base_model()) == structure(pair[1].get_base_model())


REFUSED = {
    "a range outside the model": {"layer_replication": [[0, 3]]},
    "a target that there is none of": {"target_modules": ["nothing"]},
}


@pytest.mark.parametrize("options", REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("entrance", ["get_peft_model", "inject_adapter_in_model"])
def test_what_is_refused_leaves_the_model_as_it_was(options, entrance):
    model = tiny.build("llama").eval()
    expected, before = logits(model), structure(model)
    config = config_for(peft_fx, "llama", **options)
    with pytest.raises(peft_fx.RecipeError):
        peft_fx.get_peft_model(model, config) if entrance == "get_peft_model" else peft_fx.inject_adapter_in_model(
            config, model
        )
    assert structure(model) == before
    assert torch.equal(logits(model), expected)


def test_files_that_do_not_fit_leave_the_model_as_it_was(tmp_path):
    made(peft_fx).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({key: tensor[:, :3].clone() for key, tensor in tensors.items()}, file)
    model = tiny.build("llama").eval()
    before = structure(model)
    with pytest.raises(peft_fx.AdapterFileError):
        peft_fx.PeftModel.from_pretrained(model, tmp_path)
    assert structure(model) == before


def test_injection_makes_the_model_deeper():
    models = []
    for library in LIBRARIES:
        model = tiny.build("llama").eval()
        torch.manual_seed(5)
        models.append(library.inject_adapter_in_model(config_for(library, "llama"), model))
    close(logits(models[1]), logits(models[0]))
    assert structure(models[1]) == structure(models[0])
    before = logits(models[1])
    with pytest.raises(peft_fx.RecipeError, match="first adapter"):
        peft_fx.inject_adapter_in_model(config_for(peft_fx, "llama"), models[1], "second")
    assert torch.equal(logits(models[1]), before)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_deeper_models_of_their_own(copied):
    ours = made(peft_fx)
    new = copied(ours)
    assert torch.equal(logits(new), logits(ours))
    assert structure(new.get_base_model()) == structure(ours.get_base_model())
    original = new.unload()
    assert torch.equal(logits(original), logits(tiny.build("llama").eval()))
    assert len(ours.get_base_model().model.layers) == 4


def test_a_checkpointed_training_step_gives_pefts_gradients():
    found = []
    for library in LIBRARIES:
        model = made(library, lora_dropout=0.1)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        torch.manual_seed(7)
        logits(model, use_cache=False).square().sum().backward()
        found.append({key: p.grad for key, p in by_key(library, model).items()})
    for key, expected in found[0].items():
        assert torch.allclose(found[1][key], expected, rtol=1e-4, atol=1e-5 * expected.abs().max()), key


def test_models_whose_layers_are_of_several_kinds_work_too():
    """PEFT leaves the config's layer_types as they were: IndexError."""
    kinds = ["sliding_attention", "full_attention"]
    options = {**tiny.SMALL, "num_key_value_heads": 2, "head_dim": 8, "layer_types": kinds, "sliding_window": 4}
    torch.manual_seed(0)
    base = Gemma3ForCausalLM(Gemma3TextConfig(**options)).eval()
    model = peft_fx.get_peft_model(base, config_for(peft_fx, "llama")).eval()
    assert base.config.layer_types == [kinds[0], kinds[1], kinds[1], kinds[0]]
    ids = ids_for(model)
    ways = [model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False,
                           use_cache=cached) for cached in (True, False)]  # fmt: skip
    assert torch.equal(*ways)
    model.unload()
    assert base.config.layer_types == kinds


@pytest.mark.filterwarnings("error")
def test_tied_copies_are_nothing_to_warn_of():
    made(peft_fx).add_adapter("second", config_for(peft_fx, "llama", layer_replication=None))
