"""Misuse: what PEFT reports is reported, as the same class, with a text that says what to do, and nothing is changed.

Each row runs on both libraries; PEFT says which class is due. Where we differ on purpose, the row stands in a table that says so.
"""

import importlib
import json
import warnings

import peft
import pytest
import torch
import transformers
from graphs import model_of
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


def scaled(lib):
    return lib.get_peft_model(bare(), ia3(lib)).eval()


def injected(lib):
    return lib.inject_adapter_in_model(lora(lib), bare())


def by_parameter(lib, **fields):
    return one(lib, target_modules=[], target_parameters=["q.weight"], **fields)


def two_by_parameter(lib):
    model = by_parameter(lib)
    model.add_adapter("other", lora(lib, target_modules=[], target_parameters=["q.weight"]))
    return model


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


METHODS = [
    "Adamss", "BOFT", "C3A", "Deft", "Delora", "FourierFT", "Frod", "Glora", "Gralora", "HRA", "Hira", "Lily", "LoHa", "LoKr",
    "Miss", "OFT", "Peanut", "Psoft", "Pvera", "RandLora", "Road", "Shira", "VBLoRA", "Vera", "WaveFT",
]  # fmt: skip


# How rows are written: id -> (setup, misuse(lib, model, folder), expected text)


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


def again(lib, base):
    return lib.get_peft_model(base, lora(lib)), lib.get_peft_model(base, lora(lib))


NONE = lambda lib: None  # noqa: E731

REFUSED = {
    # names
    "set_adapter: unknown": (two, lambda lib, m, t: m.set_adapter("nope"), "nope not found; there are: default, other"),
    "delete_adapter: unknown": (two, lambda lib, m, t: m.delete_adapter("nope"), "nope not found"),
    "base_model.delete_adapter: unknown": (two, lambda lib, m, t: m.base_model.delete_adapter("nope"), "nope not found"),
    "save_pretrained: unknown": (
        two, lambda lib, m, t: m.save_pretrained(t, selected_adapters=["nope"]), "no adapter 'nope' to save; there are: default",
    ),
    "get_peft_model_state_dict: unknown": (
        two, lambda lib, m, t: lib.get_peft_model_state_dict(m, adapter_name="nope"), "Adapter nope not found",
    ),
    "set_peft_model_state_dict: unknown": (
        two, lambda lib, m, t: lib.set_peft_model_state_dict(m, {}, adapter_name="nope"), "Adapter nope not found",
    ),
    "set_adapter: a list": (two, lambda lib, m, t: m.set_adapter(["default"]), "single string, got list"),
    "add_adapter: taken": (one, lambda lib, m, t: m.add_adapter("default", lora(lib)), "'default' already: delete it, or"),
    "add_adapter: a dot": (one, lambda lib, m, t: m.add_adapter("a.b", lora(lib)), "'a.b': expected a non-empty string without"),
    "add_adapter: empty": (one, lambda lib, m, t: m.add_adapter("", lora(lib)), "expected a non-empty string"),
    "add_adapter: no string": (one, lambda lib, m, t: m.add_adapter(1, lora(lib)), "expected a string, got int"),
    "add_adapter: another method": (one, lambda lib, m, t: m.add_adapter("x", ia3(lib)), "mixed=True"),
    "add_adapter: no target": (
        one, lambda lib, m, t: m.add_adapter("x", lora(lib, target_modules=["normm"])), "nearest: norm",
    ),
    "add_adapter: two with biases": (
        lambda lib: one(lib, bias="all"), lambda lib, m, t: m.add_adapter("x", lora(lib, bias="all")), "both train biases",
    ),
    "get_peft_model: a dot": (NONE, lambda lib, m, t: lib.get_peft_model(bare(), lora(lib), "a.b"), "without a dot"),
    "base_model.set_adapter: two heads": (
        two_heads, lambda lib, m, t: m.base_model.set_adapter(["default", "other"]), "set one of them",
    ),
    # targets
    "typo": (NONE, get(target_modules=["qq"]), "'qq' matches nothing; nearest: q"),
    "regex that matches nothing": (NONE, get(target_modules=".*qq"), "'.*qq' matches nothing"),
    "empty list": (NONE, get(target_modules=[]), "nothing to adapt: target_modules=[]"),
    "no default": (NONE, get(target_modules=None), "name target_modules or target_parameters"),
    "misspelt shorthand": (NONE, get(target_modules="all_linear"), "'all_linear' matches nothing"),
    "all excluded": (NONE, get(exclude_modules=["q", "v"]), "is excluded, by exclude_modules or modules_to_save: layers.0.q"),
    "all to save": (NONE, get(target_modules=["q"], modules_to_save=["q"]), "is excluded"),
    "no such layer": (NONE, get(layers_to_transform=[7]), "layers_to_transform=[7]"),
    "no such list of layers": (NONE, get(layers_to_transform=[0], layers_pattern="nope"), "layers_pattern=nope"),
    "activation": (NONE, get(target_modules=["act"]), "act: Tanh is no class whose weights are known. supported: Conv1D, Linear"),
    "own class": (NONE, get(target_modules=["odd"]), "any parameter by target_parameters"),
    "norm": (NONE, get(target_modules=["norm"]), "layers.0.norm.weight: LoRA has no form on a 1-d weight; name it in modules_to_save"),
    "list of modules": (NONE, get(target_modules=["layers"]), "layers: ModuleList is no class"),
    "saved list of modules": (NONE, get(target_modules=["head"], modules_to_save=["layers"]), "ModuleList has no forward"),
    "no such parameter": (NONE, get(target_modules=None, target_parameters=["nope"]), "'nope' matches nothing"),
    "parameter of one dimension": (NONE, get(target_modules=[], target_parameters=["odd.w"]), "takes 2-D and 3-D parameters"),
    "parameter of a target": (NONE, get(target_parameters=["q.weight"]), "set target_modules=[] to avoid it"),
    "tokens of no module": (NONE, get(trainable_token_indices={"nope": [1]}), "trainable_token_indices: 'nope' matches nothing"),
    "tokens and saved": (NONE, get(trainable_token_indices={"embed": [1]}, modules_to_save=["embed"]), "choose one"),
    "mamba's fused kernels": (
        mamba, lambda lib, m, t: lib.get_peft_model(m, config(lib, target_modules=["out_proj"])), "leave it out of the targets",
    ),
    "groups": (NONE, of_parts(r=3, target_modules=["conv"]), "r=3 is not divisible by groups=2; nearest valid: 2"),
    "attention of three widths": (NONE, of_parts(target_modules=["cross"]), "keeps separate q, k and v weights; name them in"),
    "lora_bias on an embedding": (NONE, of_parts(target_modules=["embed"], lora_bias=True), "no meaning on kind embedding"),
    "BOFT on an embedding": (NONE, of_parts("BOFT", target_modules=["embed"]), "those of an embedding are token ids"),
    **{
        f"{kind} on an activation": (NONE, of(kind, target_modules=["act"]), "Tanh is no class whose weights are known")
        for kind in METHODS
    },
    "tied tokens": (
        NONE, of_tied(ensure_weight_tying=True, trainable_token_indices={"embed_tokens": [1], "lm_head": [2]}),
        "needs the same trainable_token_indices for all tied modules",
    ),
    # LoRA's config
    "r=0": (NONE, get(r=0), "r: expected an integer from 1 to 65536, got 0"),
    "r=-1": (NONE, get(r=-1), "r: expected an integer from 1"),
    "r='8'": (NONE, get(r="8"), "r: expected int, got '8'"),
    "r=2.5": (NONE, get(r=2.5), "r: expected int, got 2.5"),
    "lora_alpha='a'": (NONE, get(lora_alpha="a"), "lora_alpha: expected float, got 'a'"),
    "lora_dropout=1.5": (NONE, get(lora_dropout=1.5), "lora_dropout: expected 0 <= p < 1, got 1.5"),
    "rank_pattern": (NONE, get(rank_pattern={"q": 0}), "rank_pattern['q']: expected an integer from 1"),
    "bias": (NONE, get(bias="nope"), "bias='nope': expected 'none', 'all'"),
    "init_lora_weights": (NONE, get(init_lora_weights="nope"), "expected one of (True, False, 'gaussian')"),
    "DoRA with lora_bias": (NONE, get(use_dora=True, lora_bias=True), "set one of lora_bias and use_dora to False"),
    "regex and layers": (NONE, get(target_modules=".*q", layers_to_transform=[0]), "put the layer numbers into the regex"),
    "regex and list of layers": (NONE, get(target_modules=".*q", layers_pattern="layers"), "put the layer numbers into"),
    "list of layers alone": (NONE, get(layers_pattern="layers"), "name the layer indices too"),
    "target_parameters: a string": (NONE, get(target_parameters="nope"), "target_parameters: expected a list of names"),
    "target_modules: a number": (NONE, get(target_modules=3), "target_modules: expected a list of names or a string, got 3"),
    "exclude_modules: a number": (NONE, get(exclude_modules=3), "exclude_modules: expected a list of names or a string"),
    "task_type": (NONE, get(task_type="NOPE"), "task_type='NOPE': expected one of SEQ_CLS"),
    "unknown field": (NONE, get(nope=1), "unexpected keyword argument 'nope'"),
    "peft_type": (NONE, lambda lib, m, t: lib.get_peft_config({"peft_type": "NOPE"}), "this version has: ADALORA"),
    "no peft_type": (NONE, lambda lib, m, t: lib.get_peft_config({"r": 4}), "names its peft_type, e.g. 'LORA'"),
    # other methods' configs
    "IA3: feedforward_modules": (NONE, of("IA3", feedforward_modules=["head"]), "['head'] are not in target_modules ['q', 'v']"),
    "LoHa: r": (NONE, of("LoHa", r=0), "r: expected an integer from 1"),
    "LoHa: list of layers": (NONE, of("LoHa", layers_pattern="layers"), "name the layer indices too"),
    "LoKr: r": (NONE, of("LoKr", r=0), "r: expected an integer from 1"),
    "OFT: no size": (NONE, of("OFT", r=0, oft_block_size=0), "(r, oft_block_size)=(0, 0): one has to be positive, the other 0"),
    "OFT: two sizes": (NONE, of("OFT", r=4, oft_block_size=4), "one has to be positive, the other 0"),
    "BOFT: no size": (NONE, of("BOFT", boft_block_size=0), "one has to be positive, the other 0"),
    "BOFT: two sizes": (NONE, of("BOFT", boft_block_size=4, boft_block_num=4), "one has to be positive, the other 0"),
    "BOFT: no divisor": (NONE, of("BOFT", boft_block_size=3), "boft_block_size=3 does not divide 8 input features; nearest valid: 2"),
    "AdaLoRA: no steps": (NONE, of("AdaLora"), "total_step=None: AdaLoRA's schedule needs the number of training steps"),
    "AdaLoRA: schedule": (NONE, of("AdaLora", total_step=10, tinit=8, tfinal=8), "leave no step to reduce the rank in"),
    "AdaLoRA: orth_reg_weight": (NONE, of("AdaLora", total_step=9, orth_reg_weight=-1), "orth_reg_weight: expected 0 or more"),
    "AdaLoRA: DoRA": (NONE, of("AdaLora", total_step=9, use_dora=True), "AdaLoRA makes no use of it"),
    "FourierFT: n_frequency": (NONE, of("FourierFT", n_frequency=0), "n_frequency"),
    "FourierFT: more than there are": (NONE, of("FourierFT", n_frequency=99), "more than the weight's 64 elements; nearest valid: 64"),
    "VBLoRA: vector_length": (NONE, of("VBLoRA", vector_length=3, num_vectors=8), "vector_length"),
    "SHiRA: r": (NONE, of("Shira", r=100), "r=100"),
    "C3A: block_size": (NONE, of("C3A", block_size=3), "block_size"),
    "MiSS: init_weights": (NONE, of("Miss", r=3, init_weights="bat"), "r=3"),
    "RoAd: variant": (NONE, of("Road", variant="x"), "variant='x': expected one of"),
    "RoAd: group_size": (NONE, of("Road", group_size=3), "group_size"),
    "DeLoRA: r": (NONE, of("Delora", r=0), "r: expected an integer from 1"),
    "GraLoRA: gralora_k": (NONE, of("Gralora", r=5, gralora_k=2), "gralora_k"),
    "WaveFT: wavelet_family": (NONE, of("WaveFT", wavelet_family="nope"), "wavelet_family='nope'"),
    "HRA: r": (NONE, of("HRA", r=0), "r: expected an integer from 1"),
    # rows of a batch
    "adapter_names: unknown": (two, rows(["nope", "default"]), "nope not found"),
    "adapter_names: too few": (two, rows(["default"]), "got 1 and 2 respectively"),
    "adapter_names: too many": (two, rows(["default"] * 3), "got 3 and 2 respectively"),
    "adapter_names: a string": (two, rows("default"), "expected a list with a name for each row, got 'default'"),
    "adapter_names: none": (two, rows([None, "other"]), "adapter names are strings, got None"),
    "adapter_names: in training": (
        two, lambda lib, m, t: m.train()(X, adapter_names=["default", "other"]), "training mode: call eval() first",
    ),
    "adapter_names: merged": (merged, rows(["default", "other"]), "merged adapters: call unmerge_adapter() first"),
    # merging
    "merge_adapter: no numbers": (broken, lambda lib, m, t: m.merge_adapter(safe_merge=True), "gives inf or nan"),
    "merge_and_unload: no numbers": (broken, lambda lib, m, t: m.merge_and_unload(safe_merge=True), "nothing was merged"),
    "merge_adapter: a string": (two, lambda lib, m, t: m.merge_adapter("other"), "expected a list of names, got 'other'"),
    "delete_adapter: merged": (merged, lambda lib, m, t: m.delete_adapter("default"), "call unmerge_adapter() before"),
    # weighted adapters
    "add_weighted_adapter: unknown": (two, combine(["default", "nope"]), "nope not found"),
    "add_weighted_adapter: of none": (two, combine([], []), "0 adapters and 0 weights"),
    "add_weighted_adapter: type": (two, combine(kind="nope"), "expected one of linear, cat, svd"),
    "add_weighted_adapter: negative svd_rank": (two, combine(svd_rank=-1), "svd_rank=-1: expected a rank of 1 or more"),
    "add_weighted_adapter: ranks": (two, combine(kind="linear"), "needs equal ranks, got [4, 2]: take cat or an svd type"),
    "add_weighted_adapter: no density": (equal_ranks, combine(kind="ties"), "ties needs density"),
    "add_weighted_adapter: negative density": (equal_ranks, combine(kind="dare_linear", density=-1.0), "from 0 to 1; got -1.0"),
    "add_weighted_adapter: signs": (
        equal_ranks, combine(kind="ties", density=0.5, majority_sign_method="nope"), "expected one of total, frequency",
    ),
    "add_weighted_adapter: heads": (two_heads, combine(), "head.weight"),
    "add_weighted_adapter: AdaLoRA": (two_of("AdaLora", total_step=9, inference_mode=True), combine(), "ADALORA has no rank"),
    "add_weighted_adapter: unknown IA3": (two_of("IA3", feedforward_modules=[]), lambda lib, m, t: m.add_weighted_adapter(["default", "nope"], [1, 1], "new"), "nope not found"),
    "merge_adapter: two on a norm": (
        two_of("LNTuning", target_modules=["norm"]), lambda lib, m, t: m.merge_adapter(["default", "other"]), "cannot act together",
    ),
    "merge_adapter: the same tokens": (
        two_of("TrainableTokens", target_modules=["embed"], token_indices=[1]),
        lambda lib, m, t: m.merge_adapter(["default", "other"]), "each replace its numbers",
    ),
    # files
    "load_state_dict": (one, lambda lib, m, t: m.load_state_dict({"nope": X}), "Missing key(s) in state_dict"),
    "from_pretrained: no folder": (NONE, load(lambda t: t / "nope"), "no such folder, and no hub id"),
    "from_pretrained: empty folder": (NONE, load(lambda t: t), "has no adapter_config.json"),
    "from_pretrained: no config": (NONE, load(without, "adapter_config.json"), "has no adapter_config.json"),
    "from_pretrained: no weights": (NONE, load(without, "adapter_model.safetensors"), "has neither adapter_model.safetensors nor"),
    "from_pretrained: a file": (NONE, load(lambda t: saved(t) / "adapter_config.json"), "expected an adapter folder or"),
    "from_pretrained: no JSON": (NONE, load(lambda t: edited(t, text="{")), "not valid JSON"),
    "from_pretrained: task_type": (NONE, load(lambda t: edited(t, task_type="NOPE")), "task_type='NOPE'"),
    "from_pretrained: shapes": (NONE, load(lambda t: edited(t, r=2)), "expected shape (2, 8), got (4, 8)"),
    "from_pretrained: no such targets": (NONE, load(lambda t: edited(t, target_modules=["nope"])), "matches nothing"),
    "from_pretrained: no config object": (NONE, load(saved, config="x"), "expected a config"),
    "from_pretrained: no model": (NONE, lambda lib, m, t: lib.PeftModel.from_pretrained(saved(t)), "model_id"),
    "load_adapter: no folder": (one, add(lambda t: t / "nope"), "no such folder, and no hub id"),
    "load_adapter: shapes": (one, add(lambda t: edited(t, r=2)), "expected shape (2, 8), got (4, 8)"),
    "load_adapter: another method": (one, add(lambda t: saved(t, ia3)), "Cannot combine adapters with different peft types"),
    "load_adapter: no name": (one, lambda lib, m, t: m.load_adapter(saved(t)), "adapter_name"),
    "save_pretrained: a file": (one, lambda lib, m, t: m.save_pretrained(saved(t) / "README.md"), "directory, not a file"),
    "config.save_pretrained: a file": (
        NONE, lambda lib, m, t: lora(lib).save_pretrained(saved(t) / "README.md"), "expected a folder",
    ),
    "config.from_pretrained: no folder": (NONE, lambda lib, m, t: lib.PeftConfig.from_pretrained(t / "nope"), "no such folder"),
    "config.from_pretrained: empty": (NONE, lambda lib, m, t: lib.PeftConfig.from_pretrained(t), "has no adapter_config.json"),
    "load_peft_weights": (NONE, lambda lib, m, t: lib.load_peft_weights(t), "has neither"),
    "set_peft_model_state_dict: shapes": (
        one,
        lambda lib, m, t: lib.set_peft_model_state_dict(m, {k: v[:1] for k, v in lib.get_peft_model_state_dict(m).items()}),
        "expected shape (4, 8), got (1, 8)",
    ),
    "create_or_update_model_card: a file": (
        one, lambda lib, m, t: m.create_or_update_model_card(saved(t) / "README.md"), "File exists",
    ),
    # models without adapters
    "get_layer_status: bare": (NONE, lambda lib, m, t: lib.get_layer_status(bare()), "got a Net without"),
    "get_model_status: bare": (NONE, lambda lib, m, t: lib.get_model_status(bare()), "got a Net without"),
    "get_peft_model_state_dict: bare": (NONE, lambda lib, m, t: lib.get_peft_model_state_dict(bare()), "got a Net without"),
    "hotswap_adapter: bare": (NONE, lambda lib, m, t: swap(lib).hotswap_adapter(bare(), saved(t), "default"), "got a Net without"),
    "prepare: bare": (bare, prepare(target_rank=2), "got a Net without"),
    "rescale_adapter_scale: bare": (
        NONE, lambda lib, m, t: sub(lib, "helpers").rescale_adapter_scale(bare(), 2.0).__enter__(), "got a Net without",
    ),
    "rescale_adapter_scale: a string": (
        one, lambda lib, m, t: sub(lib, "helpers").rescale_adapter_scale(m, "2").__enter__(), "expected a number, got str",
    ),
    "update_signature": (one, lambda lib, m, t: sub(lib, "helpers").update_signature(m, "nope"), "method='nope': expected one of"),
    "an attribute that there is not": (one, lambda lib, m, t: m.nope, "no attribute 'nope'"),
    # hotswap
    "hotswap_adapter: unknown": (
        one, lambda lib, m, t: swap(lib).hotswap_adapter(m, saved(t), "nope"), "no adapter 'nope'; resident: default",
    ),
    "hotswap_adapter: no folder": (one, lambda lib, m, t: swap(lib).hotswap_adapter(m, t / "nope", "default"), "no such folder"),
    "hotswap_adapter: more targets": (one, hotswap(target_modules=["q", "head"]), "head.weight: the resident adapter has no LORA"),
    "hotswap_adapter: another method": (one, hotswap(method=ia3), "the resident adapter has no IA3 there"),
    "hotswap_adapter: dropout": (one, hotswap(lora_dropout=0.5), "dropout differ from the resident adapter's"),
    "hotswap_adapter: DoRA": (one, hotswap(use_dora=True), "the resident adapter has no DORA there"),
    "prepare: smaller": (one, prepare(target_rank=2), "shape (4, 8) is larger than max_rank=2"),
    "prepare: compiled": (compiled, prepare(target_rank=8), "before compiling the model"),
    "prepare: check_compiled": (compiled, prepare(target_rank=8, check_compiled="x"), "got 'x'"),
    # injection
    "inject: typo": (NONE, lambda lib, m, t: lib.inject_adapter_in_model(lora(lib, target_modules=["qq"]), bare()), "nearest: q"),
    "inject: state dict and parameters": (
        NONE,
        lambda lib, m, t: lib.inject_adapter_in_model(
            lora(lib, target_parameters=["odd.w"]), bare(), state_dict={"layers.0.q.lora_A.weight": torch.ones(4, 8)}
        ),
        "leave one out",
    ),
    # AutoPeftModel
    "auto: no instance": (NONE, lambda lib, m, t: lib.AutoPeftModelForCausalLM(), "from_pretrained"),
    "auto: no folder": (NONE, lambda lib, m, t: lib.AutoPeftModelForCausalLM.from_pretrained(t / "nope"), "no such folder"),
    "auto: no base": (NONE, lambda lib, m, t: lib.AutoPeftModelForCausalLM.from_pretrained(saved(t)), "no base_model_name_or_path"),
    "auto: another task": (
        NONE,
        lambda lib, m, t: lib.AutoPeftModelForCausalLM.from_pretrained(
            edited(t, task_type="SEQ_CLS", base_model_name_or_path="x")
        ),
        "Expected target PEFT task type: CAUSAL_LM",
    ),
    "auto: no class": (
        NONE,
        lambda lib, m, t: lib.AutoPeftModel.from_pretrained(edited(t, auto_mapping=None, base_model_name_or_path="x")),
        "neither a task_type nor",
    ),
    "auto: a library that nobody asked for": (
        NONE,
        lambda lib, m, t: lib.AutoPeftModel.from_pretrained(
            edited(t, auto_mapping={"base_model_class": "System", "parent_library": "os"}, base_model_name_or_path="x")
        ),
        "'System' is no model class of transformers",
    ),
    # PeftMixedModel
    "mixed: set unknown": (mixed, lambda lib, m, t: m.set_adapter(["default", "nope"]), "nope not found"),
    "mixed: delete unknown": (mixed, lambda lib, m, t: m.delete_adapter(["default", "nope"]), "nope not found"),
    "mixed: taken": (mixed, lambda lib, m, t: m.add_adapter("other", lora(lib)), "'other' already"),
}  # fmt: skip

# PEFT stumbles over these: the class is what Python happens to raise. Ours is a ValueError.
STUMBLES = {
    "no config": (NONE, lambda lib, m, t: lib.get_peft_model(bare(), None), "expected a config, a recipe, a dict or a path"),
    "no regex": (NONE, get(target_modules="(q"), "is no regular expression"),
    "list of initialisers": (NONE, get(init_lora_weights=[1]), "expected one of"),
    "layers: a string": (NONE, get(layers_to_transform="a"), "expected layer indices, got 'a'"),
    "VeRA: r": (NONE, of("Vera", r=0), "r: expected an integer from 1"),
    "RandLoRA: r": (NONE, of("RandLora", r=0), "r: expected an integer from 1"),
    "a token outside the vocabulary": (NONE, get(trainable_token_indices={"embed": [99]}), "[99] lie outside its 11 tokens; resize"),
    "from_pretrained: a list": (NONE, load(lambda t: edited(t, text="[]")), "expected a JSON object, got list"),
    "from_pretrained: no peft_type": (NONE, load(lambda t: edited(t, text="{}")), "names its peft_type"),
    "from_pretrained: peft_type": (NONE, load(lambda t: edited(t, peft_type="NOPE")), "peft_type 'NOPE' is unknown"),
    "from_pretrained: no safetensors": (NONE, load(spoiled), "not a sound safetensors file"),
    "inject: state dict of others": (
        NONE, lambda lib, m, t: lib.inject_adapter_in_model(lora(lib), bare(), state_dict={"nope.lora_A.weight": X}), "no such module",
    ),
}  # fmt: skip

# PEFT goes on, silently or with a warning; what comes out is not what was asked for.
STRICTER = {
    "base_model.set_adapter: unknown": (two, lambda lib, m, t: m.base_model.set_adapter("nope"), "nope not found"),
    "set_requires_grad: unknown": (two, lambda lib, m, t: m.set_requires_grad("nope"), "nope not found"),
    "merge_adapter: unknown": (two, lambda lib, m, t: m.merge_adapter(["nope"]), "nope not found"),
    "merge_and_unload: unknown": (two, lambda lib, m, t: m.merge_and_unload(adapter_names=["nope"]), "nope not found"),
    "add_weighted_adapter: weights": (two, combine(weights=[1.0]), "2 adapters and 1 weights: give one weight for each"),
    "add_weighted_adapter: density": (equal_ranks, combine(kind="ties", density=2.0), "from 0 to 1; got 2.0"),
    "target_modules: a dict": (NONE, get(target_modules={"q": 1}), "expected a list of names or a string"),
    "modules_to_save: a string": (NONE, get(modules_to_save="head"), "modules_to_save: expected a list of names, got 'head'"),
    "dropout of everything": (NONE, get(lora_dropout=1.0), "expected 0 <= p < 1, got 1.0"),
    "negative dropout": (NONE, get(lora_dropout=-0.1), "expected 0 <= p < 1, got -0.1"),
    "module_dropout": (NONE, of("OFT", oft_block_size=4, module_dropout=2.0), "module_dropout: expected 0 <= p < 1"),
    "VBLoRA: topk": (NONE, of("VBLoRA", vector_length=4, num_vectors=1, topk=2), "topk=2 is more than num_vectors=1"),
    "AdaLoRA: init_r": (NONE, of("AdaLora", total_step=9, init_r=0), "init_r: expected an integer from 1"),
    "get_peft_model of a PeftModel": (one, lambda lib, m, t: lib.get_peft_model(m, lora(lib)), "add one to them"),
    "get_peft_model after an injection": (injected, lambda lib, m, t: lib.get_peft_model(m, lora(lib)), "inject_adapter_in_model("),
    "inject into a PeftModel": (one, lambda lib, m, t: lib.inject_adapter_in_model(lora(lib), m, "x"), "model.add_adapter(name"),
    "base_model.set_adapter: two on a norm": (
        two_of("LNTuning", target_modules=["norm"]), lambda lib, m, t: m.base_model.set_adapter(["default", "other"]),
        "cannot act together",
    ),
    "base_model.set_adapter: the same tokens": (
        two_of("TrainableTokens", target_modules=["embed"], token_indices=[1]),
        lambda lib, m, t: m.base_model.set_adapter(["default", "other"]), "each replace its numbers",
    ),
    "add_weighted_adapter: DoRA's factors": (
        lambda lib: two(lib, r=4, use_dora=True), combine(kind="cat"), "DORA has no two factors that can be summed: take an svd type",
    ),
    "inject the same name": (injected, lambda lib, m, t: lib.inject_adapter_in_model(lora(lib), m), "'default' already"),
    "from_pretrained on a PeftModel": (one, lambda lib, m, t: lib.PeftModel.from_pretrained(m, saved(t)), "add one to them"),
    "from_pretrained: keys missing": (
        NONE, load(with_tensors, lambda d: d.pop(min(d))), "missing: base_model.model.layers.0.q.lora_A.weight",
    ),
    "from_pretrained: keys left over": (
        NONE, load(with_tensors, lambda d: d.update(nope=torch.ones(2))), "not expected: nope",
    ),
    "from_pretrained: unknown fields": (NONE, load(lambda t: edited(t, nope=1)), "unknown config field 'nope' = 1"),
    "load_adapter: keys missing": (one, add(lambda t: with_tensors(t, lambda d: d.pop(min(d)))), "missing: base_model.model.layers"),
    "config.from_pretrained: another method's": (
        NONE, lambda lib, m, t: lib.IA3Config.from_pretrained(saved(t)), "expected a IA3Config, got a LoraConfig",
    ),
    "hotswap_adapter: a larger rank": (one, hotswap(r=8), "shape (8, 8) does not fit the slot (4, 8); widen it before compiling"),
}  # fmt: skip


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


@pytest.mark.parametrize("row", REFUSED)
def test_what_peft_refuses_is_refused_as_the_same_class(row, tmp_path):
    reference = attempt(peft, REFUSED[row], tmp_path / "peft", Exception)
    error = attempt(peft_fx, REFUSED[row], tmp_path / "ours", due(reference))
    assert REFUSED[row][2] in str(error)


@pytest.mark.parametrize("row", STUMBLES)
def test_what_peft_stumbles_over_is_refused(row, tmp_path):
    attempt(peft, STUMBLES[row], tmp_path / "peft", Exception)
    assert STUMBLES[row][2] in str(attempt(peft_fx, STUMBLES[row], tmp_path / "ours", ValueError))


@pytest.mark.parametrize("row", STRICTER)
def test_what_peft_lets_pass_is_refused(row, tmp_path):
    setup, misuse, says = STRICTER[row]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        misuse(peft, setup(peft), tmp_path)
    assert says in str(attempt(peft_fx, STRICTER[row], tmp_path / "ours", ValueError))


# Warnings

WARNED = {
    "one name of two matches nothing": (NONE, get(exclude_modules=["normm"]), "exclude_modules: 'normm' matches nothing; nearest: norm"),
    "rank_pattern": (NONE, get(rank_pattern={"nope": 3}), "rank_pattern: 'nope' matches nothing"),
    "alpha_pattern": (NONE, get(alpha_pattern={"nope": 3}), "alpha_pattern: 'nope' matches nothing"),
    "target_parameters": (NONE, get(target_parameters=["nope"]), "target_parameters: 'nope' matches nothing"),
    "a tied target": (NONE, of_tied(target_modules=["embed_tokens"]), "is tied to lm_head.weight, which does not change with it"),
    "a tied head": (NONE, of_tied(target_modules=["lm_head", "q_proj"]), "keep ties with ensure_weight_tying=True"),
    "a tied module to save": (NONE, of_tied(modules_to_save=["embed_tokens"]), "is tied to lm_head.weight"),
    "a tied module of a method without factors": (NONE, of_tied("LoHa", modules_to_save=["embed_tokens"]), "is tied to"),
    "no tie is touched": (NONE, of_tied(ensure_weight_tying=True), "ensure_weight_tying: 'tied weights' matches nothing"),
    "no ties to keep": (NONE, get(ensure_weight_tying=True), "ensure_weight_tying: 'tied weights' matches nothing"),
    "OFT's blocks": (NONE, of("OFT", r=0, oft_block_size=3), "oft_block_size=3 does not divide 8 features: 2 is used"),
    "OFT's number of blocks": (NONE, of("OFT", r=3, oft_block_size=0), "r=3 does not divide 8 features: 2 is used"),
    "VeRA's seed": (NONE, of("Vera", save_projection=False), "files hold a seed in place of the projections"),
    "RandLoRA's seed": (NONE, of("RandLora", save_projection=False), "files hold a seed"),
    "AdaLoRA's r": (NONE, of("AdaLora", total_step=9, r=4), "the rank starts as init_r"),
    "HRA's pairs": (NONE, of("HRA", r=3), "r=3 is odd"),
    "a second PeftModel": (bare, lambda lib, m, t: again(lib, m), "take their place"),
    "another revision": (
        NONE, lambda lib, m, t: lib.get_peft_model(bare(), lora(lib, revision="a"), revision="b"), "gives way to revision='b'",
    ),
    "another base": (
        lambda lib: named(bare()), lambda lib, m, t: lib.get_peft_model(m, lora(lib, base_model_name_or_path="a")), "was 'a'",
    ),
    "unmerge_adapter: nothing": (two, lambda lib, m, t: m.unmerge_adapter(), "Already unmerged: nothing to do"),
    "merge_adapter: twice": (merged, lambda lib, m, t: m.merge_adapter(), "Already merged: default; nothing to do"),
    "merge_adapter: one more": (merged, lambda lib, m, t: m.merge_adapter(["other"]), "now merged too: other"),
    "set_adapter: merged": (merged, lambda lib, m, t: m.set_adapter("other"), "Unmerging the model first"),
    "add_adapter: merged": (merged, lambda lib, m, t: m.add_adapter("x", lora(lib)), "Unmerging the model first"),
    "delete_adapter: the one that acts": (two, lambda lib, m, t: m.delete_adapter("default"), "now other is"),
    "load_adapter: shapes": (
        one, add(lambda t: edited(t, r=2), ignore_mismatched_sizes=True), "lora_A.weight: found (4, 8), expected (2, 8)",
    ),
    "from_pretrained: shapes": (NONE, load(lambda t: edited(t, r=2), ignore_mismatched_sizes=True), "found (4, 8), expected (2, 8)"),
    "set_peft_model_state_dict: shapes": (
        one,
        lambda lib, m, t: lib.set_peft_model_state_dict(
            m, {k: v[:1] for k, v in lib.get_peft_model_state_dict(m).items()}, ignore_mismatched_sizes=True
        ),
        "found (1, 8), expected (4, 8)",
    ),
    "prepare: compiled": (compiled, prepare(target_rank=8, check_compiled="warn"), "before compiling the model"),
    "inject: other targets in the state dict": (
        NONE,
        lambda lib, m, t: lib.inject_adapter_in_model(
            lora(lib), bare(), state_dict={"layers.0.q.lora_A.weight": torch.ones(4, 8)}
        ),
        "an inconsistency was discovered: the config names 4 modules, the state dict 1",
    ),
}  # fmt: skip

# PEFT warns of these.
SILENT = {
    "a name in the prefix": (one, lambda lib, m, t: m.add_adapter("lora", lora(lib)), "adapters are not found by parts of keys"),
    "fan_in_fan_out": (NONE, get(fan_in_fan_out=True), "how a weight is stored is read from its module"),
    "lora_bias without bias": (NONE, get(lora_bias=True, target_modules=["v"]), "it is merged: the module gets a bias"),
    "LoRA on groups": (NONE, of_parts(target_modules=["conv"]), "it is merged: the weight loses its groups"),
    "BEFT without bias": (NONE, of("Beft", target_modules=["v"]), "it is merged: the module gets a bias"),
    "runtime_config in a file": (NONE, load(lambda t: edited(t, runtime_config={"a": 1})), "it has no meaning in files"),
    "inject twice": (injected, lambda lib, m, t: lib.inject_adapter_in_model(lora(lib), m, "x"), "it is meant for this"),
}  # fmt: skip


def named(model):
    model.name_or_path = "b"
    return model


def warned(lib, row, folder):
    setup, misuse, _ = row
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        model = setup(lib)
        found.clear()
        folder.mkdir()
        misuse(lib, model, folder)
    return [w for w in found if not issubclass(w.category, (DeprecationWarning, FutureWarning))]


@pytest.mark.parametrize("row", WARNED)
def test_what_peft_warns_of_is_warned_of_once_in_the_same_category(row, tmp_path):
    reference, ours = (warned(lib, WARNED[row], tmp_path / lib.__name__) for lib in (peft, peft_fx))
    builtin = {next(c for c in w.category.__mro__ if c.__module__ == "builtins") for w in reference}
    assert len(ours) == 1 and WARNED[row][2] in str(ours[0].message), [str(w.message) for w in ours]
    assert any(issubclass(ours[0].category, category) for category in builtin)


@pytest.mark.parametrize("row", SILENT)
def test_what_needs_no_warning_gets_none(row, tmp_path):
    assert warned(peft, SILENT[row], tmp_path / "peft")
    assert not warned(peft_fx, SILENT[row], tmp_path / "ours")


# What PEFT refuses and works here: id -> (setup, call, check(output before, output after, what the call returned))


def changes(before, after, _):
    return not torch.equal(before, after)


def stays(before, after, _):
    return torch.allclose(before, after, atol=1e-5)


WORKS = {
    "rows of a batch with DoRA": (
        lambda lib: one(lib, use_dora=True), rows(["default", "__base__"]),
        lambda before, after, found: torch.allclose(found[0], before[0]) and torch.allclose(found[1], bare()(X)[1]),
    ),
    "rows of a batch in a mixed model": (
        mixed, rows(["default", "other"]), lambda before, after, found: torch.allclose(found[0], before[0]),
    ),
    "merging lora_bias without a bias": (
        lambda lib: one(lib, lora_bias=True, target_modules=["v"]), lambda lib, m, t: m.merge_adapter(), stays,
    ),
    "lora_bias with another initialiser": (
        NONE, get(lora_bias=True, init_lora_weights="gaussian", target_modules=["q"]),
        lambda before, after, model: "lora_B_bias" in "".join(n for n, _ in model.named_parameters()),
    ),
    "a task of a model that cannot generate": (NONE, get(task_type="CAUSAL_LM"), lambda before, after, m: m(X) is not None),
    "calls after the last adapter went": (
        one, lambda lib, m, t: m.delete_adapter("default"), lambda before, after, _: torch.equal(after, bare()(X)),
    ),
    "an embedding of FourierFT": (NONE, of("FourierFT", n_frequency=9, target_modules=["embed"]), lambda b, a, m: m(X) is not None),
    "weights of a list's and a regex's targets": (
        lambda lib: two(lib, target_modules=".*q"), combine(), lambda before, after, _: torch.equal(before, after),
    ),
    "weights in a mixed model": (mixed, combine(svd_rank=4), stays),
    "another rank into a resident adapter": (one, lambda lib, m, t: m.load_adapter(saved(t, r=2), "default"), changes),
    "swapping a method other than LoRA": (scaled, hotswap(method=ia3), stays),
    "swapping a merged adapter": (merged, hotswap(r=2), changes),
    "swapping another scale": (one, hotswap(use_rslora=True), changes),
    "swapping another pattern": (one, hotswap(alpha_pattern={"q": 32}), changes),
    "a parameter's adapter beside one of another": (
        by_parameter, lambda lib, m, t: m.add_adapter("x", lora(lib, target_modules=[], target_parameters=["v.weight"])), stays,
    ),
    "weights of adapters of parameters": (two_by_parameter, combine(), stays),
    "rows of a batch with adapters of parameters": (
        by_parameter, rows(["default", "__base__"]),
        lambda before, after, found: torch.allclose(found[0], before[0]) and torch.allclose(found[1], bare()(X)[1]),
    ),
    "dropout before a parameter": (lambda lib: by_parameter(lib, lora_dropout=0.5), lambda lib, m, t: m.eval(), stays),
    "DoRA of a parameter": (lambda lib: by_parameter(lib, use_dora=True), lambda lib, m, t: m.merge_adapter(), stays),
    "lora_bias of a parameter": (lambda lib: by_parameter(lib, lora_bias=True), lambda lib, m, t: m.merge_adapter(), stays),
    "layers of all linear modules": (
        NONE, of_tied(target_modules="all-linear", layers_to_transform=[0]),
        lambda b, a, m: all(".layers.0." in r.name for r in m.get_layer_status()),
    ),
    "DoRA on attention": (NONE, of_parts(target_modules=["self"], use_dora=True), lambda b, a, m: m(X) is not None),
    "BOFT on a convolution": (NONE, of_parts("BOFT", target_modules=["conv"], boft_block_size=2), lambda b, a, m: m(X) is not None),
    "HiRA on groups": (NONE, of_parts("Hira", target_modules=["conv"]), lambda b, a, m: m(X) is not None),
    "VeRA on an embedding": (NONE, of_parts("Vera", target_modules=["embed"]), lambda b, a, m: m(X) is not None),
    "LoHa on an embedding": (NONE, of_parts("LoHa", target_modules=["embed"]), lambda b, a, m: m(X) is not None),
    **{
        f"two {kind} adapters with other projections": (two_of(kind, {field: 2}), lambda lib, m, t: m.set_adapter("other"), stays)
        for kind, field in dict.fromkeys(("Vera", "RandLora", "Pvera", "Frod"), "projection_prng_key").items()
    },
    "two AdaLoRA adapters that train": (two_of("AdaLora", total_step=9), lambda lib, m, t: m.set_adapter("other"), stays),
    "weights of LoHa adapters": (two_of("LoHa"), combine(svd_rank=4), stays),
    "injecting a method that shares tensors": (
        NONE, lambda lib, m, t: lib.inject_adapter_in_model(config(lib, "Vera"), bare()), lambda b, a, m: m(X) is not None,
    ),
    "any method in a mixed model": (mixed, lambda lib, m, t: m.add_adapter("x", ia3(lib)), stays),
    "any method first in a mixed model": (NONE, lambda lib, m, t: lib.get_peft_model(bare(), ia3(lib), mixed=True), lambda b, a, m: m),
    "saving a mixed model": (
        mixed, lambda lib, m, t: m.save_pretrained(t) or sorted(f.name for f in t.iterdir()), lambda b, a, f: "other" in f,
    ),
    "the status of a mixed model": (mixed, lambda lib, m, t: m.get_layer_status(), lambda b, a, found: len(found) == 4),
    "the model status of a mixed model": (mixed, lambda lib, m, t: m.get_model_status(), lambda b, a, s: s.num_adapter_layers == 4),
    "a mixed model's card": (mixed, lambda lib, m, t: m.create_or_update_model_card(t), stays),
}  # fmt: skip


@pytest.mark.parametrize("row", WORKS)
@pytest.mark.filterwarnings("ignore")
def test_what_peft_refuses_and_works_here(row, tmp_path):
    setup, call, check = WORKS[row]
    with pytest.raises(Exception):  # noqa: B017  whatever it is
        model = setup(peft)
        call(peft, model, tmp_path)
        model(X)
    model = setup(peft_fx)
    before = None if model is None else output(model)
    found = call(peft_fx, model, tmp_path)
    assert check(before, None if model is None else output(model), found)


def test_a_second_peft_model_takes_the_first_ones_place():
    base = bare()
    plain = output(base)
    first = one_around(base, 1)
    with pytest.warns(UserWarning, match="take their place"):
        second = one_around(base, 2)
    expected = one_around(bare(), 2)
    assert torch.equal(output(second), output(expected)) and torch.equal(output(base), output(second))
    first.unload()
    assert torch.equal(output(second), output(expected))
    assert torch.equal(output(second.unload()), plain)


def one_around(base, seed):
    torch.manual_seed(seed)
    return peft_fx.get_peft_model(base, lora(peft_fx)).eval()


def test_a_refused_config_leaves_the_model_trainable():
    base = bare()
    for fields in ({"target_modules": ["qq"]}, {"target_modules": ["act"]}):
        with pytest.raises(ValueError):
            peft_fx.get_peft_model(base, lora(peft_fx, **fields))
        with pytest.raises(ValueError):
            peft_fx.inject_adapter_in_model(lora(peft_fx, **fields), base)
    assert all(p.requires_grad for p in base.parameters())


@pytest.mark.filterwarnings("ignore")
def test_of_other_shapes_what_fits_is_loaded(tmp_path):
    folder = edited(tmp_path, rank_pattern={"q": 2})
    loaded = []
    for lib in (peft, peft_fx):
        model = lib.PeftModel.from_pretrained(bare(), folder, ignore_mismatched_sizes=True)
        model.load_adapter(folder, "new", ignore_mismatched_sizes=True)
        model.set_adapter("new")
        loaded.append(lib.get_peft_model_state_dict(model, adapter_name="new"))
        assert not model.training
    kept = [k for k in loaded[0] if ".v." in k]
    assert loaded[0].keys() == loaded[1].keys() and len(kept) == 4
    assert all(torch.equal(loaded[0][k], loaded[1][k]) for k in kept)


@pytest.mark.filterwarnings("ignore")
def test_what_is_trained_after_adapters_came_and_went(tmp_path):
    def steps(lib):
        model = two(lib)
        yield
        model.add_adapter("third", lora(lib))
        yield model
        model.load_adapter(saved(tmp_path / lib.__name__), "fourth", is_trainable=True)
        yield model
        model.delete_adapter("default")
        yield model
        model.set_adapter("third")
        yield model

    for reference, ours in zip(steps(peft), steps(peft_fx), strict=True):
        if ours is not None:
            assert ours.get_model_status().requires_grad == reference.get_model_status().requires_grad


# PEFT's attributes

LEFT_OUT = {
    "base_model_torch_dtype": "the model has it: model.dtype",
    "config": "of a bare module, which has none",
    "get_model_config": "model.config.to_dict()",
    "get_prompt": "prompt methods",
    "get_prompt_embedding_to_save": "prompt methods",
    "inject_adapter": "inject_adapter_in_model",
    "prefix": "no tensor is found by a part of its name",
    "prepare_model_for_gradient_checkpointing": "done where the model checkpoints; else enable_input_require_grads()",
    "set_modules_to_save": "config.modules_to_save",
    "special_peft_forward_args": "what a call takes besides is in its signature",
    "subtract_mutated_init": "initialisers that change the base",
    "supports_lora_conversion": "conversion to LoRA",
    "target_module_mapping": "peft_fx.utils.constants has the tables",
    "targeted_parameter_names": "get_layer_status() names them",
    "tuner_layer_cls": "no layer classes",
    "uses_shared_state": "tensors are shared by any method",
}


@pytest.mark.parametrize("make", [one, mixed])
def test_a_model_has_what_pefts_has(make):
    reference, model = make(peft), make(peft_fx)
    own = {*dir(nn.Module()), *dir(bare())}
    missing = {
        name
        for theirs, ours in ((reference, model), (reference.base_model, model.base_model))
        for name in dir(theirs)
        if not name.startswith("_") and name not in own and not hasattr(ours, name)
    }
    assert missing <= LEFT_OUT.keys()


def test_no_attribute_is_left_out_that_is_there():
    models = [m for make in (one, mixed) for m in (make(peft_fx), make(peft_fx).base_model)]
    assert not [name for name in LEFT_OUT if all(hasattr(m, name) for m in models)]


def test_adapters_are_disabled_and_enabled_in_place():
    for lib in (peft, peft_fx):
        model = one(lib)
        before = output(model)
        model.base_model.disable_adapter_layers()
        assert torch.equal(output(model), output(bare()))
        model.base_model.enable_adapter_layers()
        assert torch.equal(output(model), before)
        assert model.base_model.targeted_module_names == ["layers.0.q", "layers.0.v", "layers.1.q", "layers.1.v"]
        assert model.peft_type == "LORA" and model.has_active_enabled_adapter and model.modules_to_save is None
        assert model.base_model.active_adapter == ["default"]


def test_an_adapter_is_a_line_of_the_models_text():
    lines = [line.strip() for line in repr(two(peft_fx)).splitlines()]
    ends = "on 4 targets (layers.0.q.weight ... layers.1.v.weight)"
    assert f"(default): LORA, acts, {ends}, 256 parameters, 256 trainable" in lines
    assert f"(other): LORA, does not act, {ends}, 128 parameters, 0 trainable" in lines
    assert "(peft_adapters): Adapters(default)" in repr(injected(peft_fx))


def test_weighted_ia3_adapters_are_pefts():
    make = two_of("IA3", {"target_modules": ["q", "head"]}, feedforward_modules=["q"], init_ia3_weights=False)
    models = make(peft), make(peft_fx)
    for name in ("default", "other"):
        numbers = peft.get_peft_model_state_dict(models[0], adapter_name=name)
        peft_fx.set_peft_model_state_dict(models[1], numbers, adapter_name=name)
    for model in models:
        model.add_weighted_adapter(["default", "other"], [0.7, -0.4], "new")
        model.set_adapter("new")
    torch.testing.assert_close(*map(output, models))
    first, second = (set(m.peft_config["new"].target_modules) for m in models)
    assert first == second == {"q", "v", "head"}
