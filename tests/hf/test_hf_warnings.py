"""What PEFT warns of is warned of, once and in the same category; but not where it is no mistake here."""

import warnings

import peft
import pytest
import torch
from misuse import (
    NONE,
    add,
    bare,
    compiled,
    edited,
    get,
    injected,
    load,
    lora,
    merged,
    of,
    of_parts,
    of_tied,
    one,
    output,
    prepare,
    two,
)

import peft_fx


def again(lib, base):
    return lib.get_peft_model(base, lora(lib)), lib.get_peft_model(base, lora(lib))


def named(model):
    model.name_or_path = "b"
    return model


# id -> (setup(library) -> model, call(library, model, folder), what the warning says, or why there is none)
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


def one_around(base, seed):
    torch.manual_seed(seed)
    return peft_fx.get_peft_model(base, lora(peft_fx)).eval()


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
