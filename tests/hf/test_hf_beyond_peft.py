"""What PEFT refuses and works here, under PEFT's names."""

import peft
import pytest
import torch
from misuse import (
    NONE,
    X,
    bare,
    combine,
    config,
    get,
    hotswap,
    ia3,
    lora,
    merged,
    mixed,
    of,
    of_parts,
    of_tied,
    one,
    output,
    rows,
    saved,
    two,
    two_of,
)

import peft_fx


def scaled(lib):
    return lib.get_peft_model(bare(), ia3(lib)).eval()


def by_parameter(lib, **fields):
    return one(lib, target_modules=[], target_parameters=["q.weight"], **fields)


def two_by_parameter(lib):
    model = by_parameter(lib)
    model.add_adapter("other", lora(lib, target_modules=[], target_parameters=["q.weight"]))
    return model


def changes(before, after, _):
    return not torch.equal(before, after)


def stays(before, after, _):
    return torch.allclose(before, after, atol=1e-5)


# id -> (setup, call, check(output before, output after, what the call returned))
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
