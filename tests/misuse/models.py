"""Misuse of a model and its adapters, by name, in batches, merged, weighted, injected: refused as PEFT does, and nothing changes."""

import torch

from misuse import (
    NONE,
    X,
    bare,
    combine,
    ia3,
    injected,
    lora,
    merged,
    mixed,
    one,
    prepare,
    rows,
    saved,
    sub,
    swap,
    two,
    two_of,
)


def equal_ranks(lib):
    return two(lib, r=4)


def broken(lib):
    model = two(lib)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_A" in n).fill_(float("nan"))
    return model


def two_heads(lib):
    return two(lib, {"modules_to_save": ["head"]}, modules_to_save=["head"])


REFUSED = {
    # names
    "set_adapter: unknown": (two, lambda lib, m, t: m.set_adapter("nope"), "no adapter 'nope'; resident: default, other"),
    "delete_adapter: unknown": (two, lambda lib, m, t: m.delete_adapter("nope"), "no adapter 'nope'"),
    "base_model.delete_adapter: unknown": (two, lambda lib, m, t: m.base_model.delete_adapter("nope"), "no adapter 'nope'"),
    "save_pretrained: unknown": (
        two, lambda lib, m, t: m.save_pretrained(t, selected_adapters=["nope"]), "no adapter 'nope' to save; there are: default",
    ),
    "get_peft_model_state_dict: unknown": (
        two, lambda lib, m, t: lib.get_peft_model_state_dict(m, adapter_name="nope"), "no adapter 'nope'",
    ),
    "set_peft_model_state_dict: unknown": (
        two, lambda lib, m, t: lib.set_peft_model_state_dict(m, {}, adapter_name="nope"), "no adapter 'nope'",
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
        two_heads, lambda lib, m, t: m.base_model.set_adapter(["default", "other"]), "take one of them",
    ),
    # rows of a batch
    "adapter_names: unknown": (two, rows(["nope", "default"]), "no adapter 'nope'"),
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
    "add_weighted_adapter: unknown": (two, combine(["default", "nope"]), "no adapter 'nope'"),
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
    "add_weighted_adapter: unknown IA3": (two_of("IA3", feedforward_modules=[]), lambda lib, m, t: m.add_weighted_adapter(["default", "nope"], [1, 1], "new"), "no adapter 'nope'"),
    "merge_adapter: two on a norm": (
        two_of("LNTuning", target_modules=["norm"]), lambda lib, m, t: m.merge_adapter(["default", "other"]), "cannot act together",
    ),
    "merge_adapter: the same tokens": (
        two_of("TrainableTokens", target_modules=["embed"], token_indices=[1]),
        lambda lib, m, t: m.merge_adapter(["default", "other"]), "each replace its numbers",
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
    # injection
    "inject: typo": (NONE, lambda lib, m, t: lib.inject_adapter_in_model(lora(lib, target_modules=["qq"]), bare()), "nearest: q"),
    "inject: state dict and parameters": (
        NONE,
        lambda lib, m, t: lib.inject_adapter_in_model(
            lora(lib, target_parameters=["odd.w"]), bare(), state_dict={"layers.0.q.lora_A.weight": torch.ones(4, 8)}
        ),
        "leave one out",
    ),
    # PeftMixedModel
    "mixed: set unknown": (mixed, lambda lib, m, t: m.set_adapter(["default", "nope"]), "no adapter 'nope'"),
    "mixed: delete unknown": (mixed, lambda lib, m, t: m.delete_adapter(["default", "nope"]), "no adapter 'nope'"),
    "mixed: taken": (mixed, lambda lib, m, t: m.add_adapter("other", lora(lib)), "'other' already"),
}  # fmt: skip

STUMBLES = {
    "inject: state dict of others": (
        NONE, lambda lib, m, t: lib.inject_adapter_in_model(lora(lib), bare(), state_dict={"nope.lora_A.weight": X}), "no such module",
    ),
}  # fmt: skip

STRICTER = {
    "base_model.set_adapter: unknown": (two, lambda lib, m, t: m.base_model.set_adapter("nope"), "no adapter 'nope'"),
    "set_requires_grad: unknown": (two, lambda lib, m, t: m.set_requires_grad("nope"), "no adapter 'nope'"),
    "merge_adapter: unknown": (two, lambda lib, m, t: m.merge_adapter(["nope"]), "no adapter 'nope'"),
    "merge_and_unload: unknown": (two, lambda lib, m, t: m.merge_and_unload(adapter_names=["nope"]), "no adapter 'nope'"),
    "add_weighted_adapter: weights": (two, combine(weights=[1.0]), "2 adapters and 1 weights: give one weight for each"),
    "add_weighted_adapter: density": (equal_ranks, combine(kind="ties", density=2.0), "from 0 to 1; got 2.0"),
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
}  # fmt: skip
