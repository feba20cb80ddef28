"""`get_layer_status` and `get_model_status` say what PEFT's say."""

import dataclasses

import peft
import pytest
from torch import nn

import peft_fx
from peft_fx.hf.model.status import BEFORE, layer_status
from peft_fx.methods import INTERNAL, METHODS


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin, self.conv, self.emb = nn.Linear(16, 16), nn.Conv2d(16, 16, 3), nn.Embedding(10, 16)
        self.ln, self.mha = nn.LayerNorm(16), nn.MultiheadAttention(16, 2)


class Large(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin0, self.conv0, self.emb0 = nn.Linear(10, 10), nn.Conv2d(3, 10, 3), nn.Embedding(10, 10)
        self.lin1, self.conv1, self.emb1 = nn.Linear(10, 10), nn.Conv2d(3, 10, 3), nn.Embedding(10, 10)


def two(lib):
    model = lib.get_peft_model(Large(), lib.LoraConfig(target_modules=["emb0", "conv1", "lin0"]))
    model.add_adapter("other", lib.LoraConfig(target_modules=["lin1", "lin0"], r=16))
    return model


def merged(*names):
    def make(lib):
        model = two(lib)
        model.merge_adapter(["other"])
        model.merge_adapter(list(names))
        return model

    return make


def other_set(lib):
    model = two(lib)
    model.set_adapter("other")
    return model


def made(**options):
    return lambda lib: lib.get_peft_model(Large(), lib.LoraConfig(**options))


MODELS = {
    "two": two,
    "other set": other_set,
    "merged": merged("default", "other"),
    "one merged": merged("other"),
    "saved": made(target_modules=["lin0"], modules_to_save=["lin1"]),
    "tokens": made(target_modules=["lin0"], trainable_token_indices={"emb0": [0, 1]}),
    "parameters": made(target_parameters=["lin1.weight", "lin0.weight"]),
    "both": made(target_parameters=["lin0.weight"], target_modules=["lin1"]),
    "mixed kinds": lambda lib: lib.get_peft_model(Large(), lib.LoHaConfig(target_modules=["conv1", "lin0"])),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore")
def test_status_is_pefts(name):
    ours, theirs = (MODELS[name](lib) for lib in (peft_fx, peft))
    found = [[dataclasses.asdict(r) for r in m.get_layer_status()] for m in (ours, theirs)]
    assert found[0] == found[1]
    summaries = [dataclasses.asdict(m.get_model_status()) for m in (ours, theirs)]
    assert summaries[0] == summaries[1]


def layers(lib, method, target):
    config = getattr(lib, peft_fx.PEFT_TYPE_TO_CONFIG_MAPPING[method].__name__)
    try:
        model = lib.get_peft_model(Parts(), config(target_modules=[target], **OPTIONS.get(method, {})))
        return [(r.name, r.module_type) for r in model.get_layer_status()]
    except (ValueError, TypeError, AttributeError, KeyError, RuntimeError):
        return None


OPTIONS = {"ADALORA": {"total_step": 10}, "C3A": {"block_size": 4}, "FOURIERFT": {"n_frequency": 10},
           "IA3": {"feedforward_modules": []}, "MISS": {"r": 2}, "PSOFT": {"r": 2}, "ROAD": {"group_size": 4}, "SHIRA": {"r": 2},
           "VBLORA": {"vector_length": 4, "num_vectors": 8, "topk": 2}, "WAVEFT": {"n_frequency": 10}}  # fmt: skip


@pytest.mark.parametrize("method", sorted(METHODS.keys() - INTERNAL))
@pytest.mark.filterwarnings("ignore")
def test_layers_are_called_what_pefts_are(method):
    compared = 0
    for target in ("lin", "conv", "emb", "ln", "mha"):
        ours, theirs = layers(peft_fx, method, target), layers(peft, method, target)
        if ours and theirs:
            assert ours == theirs
            compared += 1
    assert compared or method in ("OSF", "TRAINABLE_TOKENS"), (
        "PEFT has no status of OSF, its tokens need an embedding alone"
    )


def test_every_exception_is_a_methods():
    assert BEFORE.keys() <= METHODS.keys()


def test_a_model_whose_adapters_were_all_taken_out_has_no_status():
    model = two(peft_fx)
    model.peft_config.clear()
    with pytest.raises(ValueError, match="no adapter is on any module"):
        layer_status(model.base_model)
