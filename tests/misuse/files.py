"""Misuse of adapter files (loading, saving, hotswap, AutoPeftModel): refused as PEFT does, and nothing changes."""

import torch
from safetensors.torch import load_file, save_file

from misuse import (
    NONE,
    X,
    add,
    compiled,
    edited,
    hotswap,
    ia3,
    load,
    lora,
    one,
    prepare,
    saved,
    swap,
)


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


REFUSED = {
    # files
    "load_state_dict": (one, lambda lib, m, t: m.load_state_dict({"nope": X}), "Missing key(s) in state_dict"),
    "from_pretrained: no folder": (NONE, load(lambda t: t / "nope"), "no such folder, and no hub id"),
    "from_pretrained: empty folder": (NONE, load(lambda t: t), "has no adapter_config.json"),
    "from_pretrained: no config": (NONE, load(without, "adapter_config.json"), "has no adapter_config.json"),
    "from_pretrained: no weights": (NONE, load(without, "adapter_model.safetensors"), "has neither adapter_model.safetensors nor"),
    "from_pretrained: a file": (NONE, load(lambda t: saved(t) / "adapter_config.json"), "expected an adapter folder or"),
    "from_pretrained: no JSON": (NONE, load(lambda t: edited(t, text="{")), "not valid JSON"),
    "from_pretrained: task_type": (NONE, load(lambda t: edited(t, task_type="NOPE")), "task_type='NOPE'"),
    "from_pretrained: shapes": (NONE, load(lambda t: edited(t, r=2)), "expected shape [2, 8], got [4, 8]"),
    "from_pretrained: no such targets": (NONE, load(lambda t: edited(t, target_modules=["nope"])), "matches nothing"),
    "from_pretrained: no config object": (NONE, load(saved, config="x"), "expected a config"),
    "from_pretrained: no model": (NONE, lambda lib, m, t: lib.PeftModel.from_pretrained(saved(t)), "model_id"),
    "load_adapter: no folder": (one, add(lambda t: t / "nope"), "no such folder, and no hub id"),
    "load_adapter: shapes": (one, add(lambda t: edited(t, r=2)), "expected shape [2, 8], got [4, 8]"),
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
        "expected shape [4, 8], got [1, 8]",
    ),
    "create_or_update_model_card: a file": (
        one, lambda lib, m, t: m.create_or_update_model_card(saved(t) / "README.md"), "File exists",
    ),
    # hotswap
    "hotswap_adapter: unknown": (
        one, lambda lib, m, t: swap(lib).hotswap_adapter(m, saved(t), "nope"), "no adapter 'nope'; resident: default",
    ),
    "hotswap_adapter: no folder": (one, lambda lib, m, t: swap(lib).hotswap_adapter(m, t / "nope", "default"), "no such folder"),
    "hotswap_adapter: more targets": (one, hotswap(target_modules=["q", "head"]), "head.weight: the resident adapter has no LORA"),
    "hotswap_adapter: another method": (one, hotswap(method=ia3), "the resident adapter has no IA3 there"),
    "hotswap_adapter: dropout": (one, hotswap(lora_dropout=0.5), "dropout differ from the resident adapter's"),
    "hotswap_adapter: DoRA": (one, hotswap(use_dora=True), "the resident adapter has no DORA there"),
    "prepare: smaller": (one, prepare(target_rank=2), "shape [4, 8] is larger than max_rank=2"),
    "prepare: compiled": (compiled, prepare(target_rank=8), "before compiling the model"),
    "prepare: check_compiled": (compiled, prepare(target_rank=8, check_compiled="x"), "got 'x'"),
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
        "names a class of 'os', which is not in import_allowlist",
    ),
}  # fmt: skip

STUMBLES = {
    "from_pretrained: a list": (NONE, load(lambda t: edited(t, text="[]")), "expected a JSON object, got list"),
    "from_pretrained: no peft_type": (NONE, load(lambda t: edited(t, text="{}")), "names its peft_type"),
    "from_pretrained: peft_type": (NONE, load(lambda t: edited(t, peft_type="NOPE")), "peft_type 'NOPE' is unknown"),
    "from_pretrained: no safetensors": (NONE, load(spoiled), "not a sound safetensors file"),
}  # fmt: skip

STRICTER = {
    "from_pretrained on a PeftModel": (one, lambda lib, m, t: lib.PeftModel.from_pretrained(m, saved(t)), "add one to them"),
    "from_pretrained: no key of its own": (
        NONE, load(with_tensors, lambda d: (d.clear(), d.update(nope=torch.ones(2)))), "not expected: nope",
    ),
    "from_pretrained: a variant": (NONE, load(lambda t: edited(t, use_qalora=True)), "QALoRA is not in this version yet"),
    "load_adapter: no key of its own": (
        one, add(lambda t: with_tensors(t, lambda d: (d.clear(), d.update(nope=torch.ones(2))))), "missing: base_model.model.layers",
    ),
    "config.from_pretrained: another method's": (
        NONE, lambda lib, m, t: lib.IA3Config.from_pretrained(saved(t)), "expected a IA3Config, got a LoraConfig",
    ),
}  # fmt: skip
