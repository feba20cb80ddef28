"""Which numbers are float32: models prepared for packed weights, mixed precision, adapters cast back, as with PEFT."""

import copy
import importlib

import conformance
import methods
import peft
import pytest
import torch
from beside_peft import LORA, both, logits
from conformance import build
from graphs import inputs, model_of

import peft_fx
from peft_fx.recipe import as_config


def state(model):
    return {n: (p.dtype, p.requires_grad) for n, p in model.named_parameters(remove_duplicate=False)}


@pytest.mark.parametrize("attributes", [
    {}, {"is_loaded_in_8bit": True}, {"is_loaded_in_4bit": True}, {"quantization_method": "gptq"},
    {"quantization_method": "hqq"}, {"hqq_quantized": True}, {"quantization_method": "bitsandbytes"},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("options", [{}, {"use_gradient_checkpointing": False},
                                     {"gradient_checkpointing_kwargs": {"use_reentrant": False}}], ids=str)  # fmt: skip
def test_a_model_is_prepared_for_packed_weights_as_by_peft(attributes, options):
    models = [model_of("tied_llama").bfloat16() for _ in range(2)]
    for model, library in zip(models, (peft, peft_fx), strict=True):
        vars(model).update(attributes)
        assert library.prepare_model_for_kbit_training(model, **copy.deepcopy(options)) is model
    theirs, mine = models
    assert state(mine) == state(theirs)
    assert mine.get_input_embeddings().weight is mine.get_output_embeddings().weight
    assert mine.is_gradient_checkpointing == theirs.is_gradient_checkpointing
    outputs = [m.get_input_embeddings()(torch.ones(1, 2, dtype=torch.long)).requires_grad for m in models]
    assert outputs[0] == outputs[1]
    layers = [m.model.layers[0].train() for m in models]
    keywords = [getattr(getattr(m, "_gradient_checkpointing_func", None), "keywords", None) for m in layers]
    assert keywords[0] == keywords[1]


def test_a_prepared_model_trains_as_pefts():
    gradients = []
    for library in (peft, peft_fx):
        base = model_of("tied_llama").bfloat16()
        base.is_loaded_in_8bit = True
        base = library.prepare_model_for_kbit_training(base)
        torch.manual_seed(0)
        model = library.get_peft_model(base, library.LoraConfig(task_type="CAUSAL_LM", **LORA)).train()
        model(**inputs("tied_llama"), labels=inputs("tied_llama")["input_ids"]).loss.backward()
        gradients.append([p.grad for n, p in model.named_parameters() if "lora_" in n])
    for expected, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)


def test_mixed_precision_as_pefts(tmp_path):
    counts = []
    for library, model in zip((peft, peft_fx), both(tmp_path), strict=True):
        library.cast_mixed_precision_params(model, torch.bfloat16)
        assert all(p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16) for p in model.parameters())
        counts.append(sum(p.numel() for p in model.parameters() if p.dtype == torch.float32))
        assert torch.isfinite(logits(model)).all()
    assert counts[0] == counts[1]


def test_adapters_become_float32_again(tmp_path):
    models = both(tmp_path, adapters=("default", "other"))
    for library, model in zip((peft, peft_fx), models, strict=True):
        model.to(torch.bfloat16)
        functions = importlib.import_module(f"{library.__name__}.functional")
        functions.cast_adapter_dtype(model, "default", autocast_adapter_dtype=False)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        functions.cast_adapter_dtype(model, "default")
        for name, p in model.named_parameters():
            if "lora_" in name:
                assert p.dtype == (torch.float32 if "default" in name else torch.bfloat16)
                assert p.requires_grad == ("default" in name)
    torch.testing.assert_close(logits(models[1]), logits(models[0]), atol=0.03, rtol=0.03)
    assert models[1].active_adapters == ["default"]


def half_cells():
    """Of each method the first and the last two of its options, on a linear layer."""
    found = {}
    for cell in (*methods.cells("PEFT"), *methods.cells("DEFINED")):
        if cell[2] == "wide":
            found.setdefault(cell[0], {}).setdefault(methods.label(cell), cell)
    return {label: cell for cells in found.values() for label, cell in [*[*cells.items()][:1], *[*cells.items()][-2:]]}


CELLS = half_cells()


@pytest.mark.parametrize("label", CELLS)
@pytest.mark.filterwarnings("ignore")
def test_adapters_in_the_bases_half_precision_run_train_and_merge(label):
    _, options, subject, *_ = CELLS[label]
    model = peft_fx.get_peft_model(build(subject, torch.bfloat16), as_config(options), autocast_adapter_dtype=False)
    owned = [p for n, p in model.named_parameters() if model.prefix in n]
    assert owned and {p.dtype for p in owned} == {torch.bfloat16}
    given = conformance.inputs(subject, torch.bfloat16)
    model.train()(**given).float().sum().backward()
    assert {p.grad.dtype for p in owned if p.grad is not None} == {torch.bfloat16}
    before = model.eval()(**given)
    assert before.dtype == torch.bfloat16 and before.isfinite().all()
    try:
        model.merge_adapter()
    except peft_fx.MergeError:
        return
    scale = before.float().abs().max() + 1
    assert (model(**given) - before).float().abs().max() < 0.05 * scale
    model.unmerge_adapter()
    assert torch.equal(model(**given), before)
