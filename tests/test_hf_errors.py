"""Misuse: what PEFT reports is reported, as the same class, with a text that says what to do, and nothing is changed.

Each row runs on both libraries; PEFT says which class is due. Where we differ on purpose, the row stands in a table that says so.
"""

import importlib
import json
import warnings
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
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
        self.embed, self.layers, self.act, self.odd = nn.Embedding(11, 8), nn.ModuleList([Block(), Block()]), nn.Tanh(), Odd()
        self.head = nn.Linear(8, 4)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.odd(self.act(x)))


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


def equal_ranks(lib):
    return two(lib, r=4)


def merged(lib):
    model = two(lib)
    model.merge_adapter()
    return model


def broken(lib):
    model = two(lib)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_A" in n).fill_(float("nan"))
    return model


def two_heads(lib):
    return two(lib, {"modules_to_save": ["head"]}, modules_to_save=["head"])


def mixed(lib):
    model = lib.get_peft_model(bare(), lora(lib), mixed=True)
    model.add_adapter("other", config(lib, "LoHa", r=4))
    return model.eval()


def scaled(lib):
    return lib.get_peft_model(bare(), ia3(lib)).eval()


def injected(lib):
    return lib.inject_adapter_in_model(lora(lib), bare())


def compiled(lib):
    return torch.compile(one(lib), backend="eager")


def mamba(lib):
    options = dict(vocab_size=11, hidden_size=8, num_hidden_layers=1, state_size=4, time_step_rank=2)
    return transformers.MambaForCausalLM(transformers.MambaConfig(**options)).eval()


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


def without(folder, name):
    (saved(folder) / name).unlink()
    return folder / "saved"


def with_tensors(folder, change):
    file = saved(folder) / "adapter_model.safetensors"
    tensors = {k: t.clone() for k, t in load_file(file).items()}
    change(tensors)
    save_file(tensors, file)
    return folder / "saved"


def spoiled(folder):
    (saved(folder) / "adapter_model.safetensors").write_text("nonsense")
    return folder / "saved"


# How rows are written: id -> (setup, misuse(lib, model, folder), expected text)


def get(**fields):
    return lambda lib, m, t: lib.get_peft_model(bare(), lora(lib, **fields))


def of(kind, **fields):
    return lambda lib, m, t: lib.get_peft_model(bare(), config(lib, kind, **fields))


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


def again(lib, base):
    return lib.get_peft_model(base, lora(lib)), lib.get_peft_model(base, lora(lib))


NONE = lambda lib: None  # noqa: E731
