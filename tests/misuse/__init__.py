"""Misuse of PEFT's names, run on both libraries: what the tables in these files are written with, and how a row is tried.

A row is id -> (setup(library) -> model, misuse(library, model, folder), what our text says). PEFT says which class is due:

    REFUSED   PEFT refuses it; so do we, with the same class
    STUMBLES  PEFT stumbles over it: the class is what Python happens to raise. Ours is a ValueError
    STRICTER  PEFT goes on, silently or with a warning, and what comes out is not what was asked for. Ours is a ValueError

Other tests take its models and calls: test_hf_warnings.py, test_hf_beyond_peft.py, test_hf_attributes.py, test_combine.py.
"""

import importlib
import json
import warnings

import peft
import pytest
import torch
from graphs import model_of
from torch import nn

import peft_fx

X = torch.arange(6).reshape(2, 3)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.v, self.norm = nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.LayerNorm(8)

    def forward(self, x):
        return self.norm(x + self.v(torch.tanh(self.q(x))))


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(8))

    def forward(self, x):
        return x * self.w


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.layers, self.act, self.odd = (
            nn.Embedding(11, 8),
            nn.ModuleList([Block(), Block()]),
            nn.Tanh(),
            Odd(),
        )
        self.head = nn.Linear(8, 4)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.odd(self.act(x)))


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.conv = nn.Embedding(11, 8), nn.Conv1d(8, 8, 3, groups=2, padding=1)
        self.self, self.cross = nn.MultiheadAttention(8, 2, batch_first=True), nn.MultiheadAttention(8, 2, vdim=4)

    def forward(self, ids):
        x = self.conv(self.embed(ids).mT).mT
        return self.self(x, x, x)[0]


# Models: (library) -> model


def bare(lib=None):
    torch.manual_seed(0)
    return Net().eval()


def config(lib, kind="Lora", **fields):
    return getattr(lib, f"{kind}Config")(**{"target_modules": ["q", "v"], **fields})


def lora(lib, **fields):
    return config(lib, **{"r": 4, "init_lora_weights": False, **fields})


def ia3(lib):
    return config(lib, "IA3", feedforward_modules=[])


def one(lib, **fields):
    return lib.get_peft_model(bare(), lora(lib, **fields)).eval()


def two(lib, first=None, **fields):
    model = one(lib, **first or {})
    model.add_adapter("other", lora(lib, **{"r": 2, **fields}))
    return model


def merged(lib):
    model = two(lib)
    model.merge_adapter()
    return model


def two_of(kind, second=None, **fields):
    def make(lib):
        model = lib.get_peft_model(bare(), config(lib, kind, **fields)).eval()
        model.add_adapter("other", config(lib, kind, **{**fields, **(second or {})}))
        return model

    return make


def mixed(lib):
    model = lib.get_peft_model(bare(), lora(lib), mixed=True)
    model.add_adapter("other", config(lib, "LoHa", r=4))
    return model.eval()


def injected(lib):
    return lib.inject_adapter_in_model(lora(lib), bare())


def compiled(lib):
    return torch.compile(one(lib), backend="eager")


def sub(lib, name):
    return importlib.import_module(f"{lib.__name__}.{name}")


def swap(lib):
    return sub(lib, "utils.hotswap")


# Files: (folder) -> adapter folder, written by PEFT


def saved(folder, method=lora, **fields):
    peft.get_peft_model(bare(), method(peft, **fields)).save_pretrained(folder / "saved")
    return folder / "saved"


def edited(folder, method=lora, text=None, **changes):
    """saved, with other entries, or another text, in its config."""
    file = saved(folder, method) / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}) if text is None else text)
    return folder / "saved"


# How rows are written: setups and misuses


def get(**fields):
    return lambda lib, m, t: lib.get_peft_model(bare(), lora(lib, **fields))


def of(kind, **fields):
    return lambda lib, m, t: lib.get_peft_model(bare(), config(lib, kind, **fields))


def of_parts(kind="Lora", **fields):
    return lambda lib, m, t: lib.get_peft_model(Parts().eval(), getattr(lib, f"{kind}Config")(**fields))


def of_tied(kind="Lora", **fields):
    more = {"target_modules": ["q_proj"], **fields}
    return lambda lib, m, t: lib.get_peft_model(model_of("tied_llama"), getattr(lib, f"{kind}Config")(**more))


def load(file, *args, **options):
    return lambda lib, m, t: lib.PeftModel.from_pretrained(bare(), file(t, *args), **options)


def add(file, **options):
    return lambda lib, m, t: m.load_adapter(file(t), "new", **options)


def combine(names=("default", "other"), weights=(1.0, 1.0), name="new", kind="svd", **options):
    return lambda lib, m, t: m.add_weighted_adapter(list(names), list(weights), name, kind, **options)


def rows(names):
    return lambda lib, m, t: m(X, adapter_names=names)


def hotswap(**fields):
    return lambda lib, m, t: swap(lib).hotswap_adapter(m, saved(t, **fields), "default")


def prepare(**options):
    return lambda lib, m, t: swap(lib).prepare_model_for_compiled_hotswap(m, **options)


NONE = lambda lib: None  # noqa: E731


# What becomes of them


def attempt(lib, row, folder, expected):
    """Tries the misuse; the error. A model of ours computes what it did."""
    setup, misuse, _ = row
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = setup(lib)
        known = lib is peft_fx and model is not None
        before = output(model) if known else None
        folder.mkdir()
        with pytest.raises(expected) as caught:
            misuse(lib, model, folder)
        if known:
            torch.testing.assert_close(output(model.eval()), before, rtol=0, atol=0, equal_nan=True)
    return caught.value


def output(model):
    found = model(X)
    return getattr(found, "logits", found)


def due(error):
    """What a script would catch: PEFT's class, where it has one, else Python's."""
    if isinstance(error, peft.NoMatchingPeftModuleError):
        return peft_fx.NoMatchingPeftModuleError
    return next(c for c in type(error).__mro__ if c.__module__ == "builtins")


def refused(row, folder):
    """The text of our error, which is of the class that PEFT raises."""
    reference = attempt(peft, row, folder / "peft", Exception)
    return str(attempt(peft_fx, row, folder / "ours", due(reference)))


def stumbled(row, folder):
    """The text of our ValueError; PEFT raises something."""
    attempt(peft, row, folder / "peft", Exception)
    return str(attempt(peft_fx, row, folder / "ours", ValueError))


def stricter(row, folder):
    """The text of our ValueError; PEFT raises nothing."""
    setup, misuse, _ = row
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        misuse(peft, setup(peft), folder)
    return str(attempt(peft_fx, row, folder / "ours", ValueError))
