"""PEFT's names over the verbs: the same calls give what PEFT gives, on files that both read and write."""

import copy
import inspect
import sys

import peft
import pytest
import torch
import transformers
from graphs import inputs, model_of
from marks import quick
from torch.utils.data import Dataset

import peft_fx

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
EACH_FORM = pytest.mark.usefixtures("each_form")

LORA = dict(r=4, lora_alpha=32, target_modules="all-linear", init_lora_weights=False)
TASKS = {"tied_llama": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM", "bert": "FEATURE_EXTRACTION"}


def pair(name, folder, is_trainable=False, **config):
    """(PEFT's model, ours) with the same adapter, from PEFT's files."""
    base = model_of(name)
    reference = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(task_type=TASKS[name], **{**LORA, **config}))
    reference.save_pretrained(folder)
    load = lambda library: library.PeftModel.from_pretrained(  # noqa: E731
        copy.deepcopy(base), folder, is_trainable=is_trainable
    )
    return load(peft), load(peft_fx)


@pytest.fixture
def llamas(tmp_path):
    return pair("tied_llama", tmp_path / "adapter")


def logits(model, **more):
    return model(**inputs("tied_llama"), **more).logits


def generated(model, name="tied_llama", **options):
    torch.manual_seed(3)
    ids = inputs(name)["input_ids"]
    return model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, pad_token_id=0, **options
    )


# Calls

WAYS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True},
    "beam": {"do_sample": False, "num_beams": 3},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
}


@EACH_FORM
def test_a_call_gives_what_peft_gives(llamas):
    reference, model = llamas
    labels = inputs("tied_llama")["input_ids"].clone()
    for more in ({}, {"labels": labels}, {"output_hidden_states": True}, {"use_cache": False}):
        found, expected = (m(**inputs("tied_llama"), **more) for m in (model, reference))
        torch.testing.assert_close(found.logits, expected.logits)
        assert more.get("labels") is None or torch.allclose(found.loss, expected.loss)
    embedded = reference.get_input_embeddings()(labels)
    torch.testing.assert_close(model(inputs_embeds=embedded).logits, reference(inputs_embeds=embedded).logits)


@pytest.mark.parametrize("way", quick(WAYS, "greedy"))
def test_generated_tokens_are_pefts(llamas, way):
    reference, model = llamas
    assert torch.equal(generated(model, **WAYS[way]), generated(reference, **WAYS[way]))
    assert (logits(model) - logits(model_of("tied_llama"))).abs().max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("way", ["greedy", "beam"])
def test_generated_tokens_of_an_encoder_and_a_decoder(tmp_path, way):
    """generate calls the encoder on its own, past the model."""
    reference, model = pair("t5", tmp_path, lora_alpha=64)
    assert torch.equal(generated(model, "t5", **WAYS[way]), generated(reference, "t5", **WAYS[way]))


@pytest.mark.slow
def test_any_module_of_the_model_is_adapted_when_it_is_called_itself(llamas):
    reference, model = llamas
    x = inputs("tied_llama")
    torch.testing.assert_close(model.model.model(**x).last_hidden_state, reference.model.model(**x).last_hidden_state)
    h = torch.randn(2, 3, reference.config.hidden_size)
    layer = lambda m: m.get_base_model().model.layers[0].self_attn.q_proj(h)  # noqa: E731
    torch.testing.assert_close(layer(model), layer(reference))


@pytest.mark.slow
def test_many_kinds_of_calls_do_not_make_dynamo_give_up(llamas):
    """After a few graphs of one function Dynamo runs it as it is written: the adapters would be gone without a word."""
    reference, model = llamas
    with torch._dynamo.config.patch(recompile_limit=2, accumulated_recompile_limit=4):
        for i in range(6):
            ids = torch.randint(0, 20, (1 + i, 3 + i))
            more = {"output_hidden_states": bool(i % 2), "use_cache": i > 3, "labels": ids if i in (2, 5) else None}
            torch.testing.assert_close(model(input_ids=ids, **more).logits, reference(input_ids=ids, **more).logits)


@pytest.mark.slow
def test_inside_a_torch_compile_of_the_users(llamas):
    reference, model = llamas
    compiled = torch.compile(lambda **x: 2 * model(**x).logits, backend="eager")
    torch.testing.assert_close(compiled(**inputs("tied_llama")), 2 * logits(reference))


def test_the_signature_and_the_class_are_the_models(llamas):
    _, model = llamas
    base = model.get_base_model()
    assert inspect.signature(model.forward) == inspect.signature(base.forward)
    assert isinstance(model, transformers.PreTrainedModel) and isinstance(model, peft_fx.PeftModelForCausalLM)
    assert type(model).__name__ in repr(model) and model.config is base.config and model.device == base.device


# Adapters


def test_the_base_is_frozen_and_counted_as_in_peft(capsys):
    base = model_of("tied_llama")
    configs = [library.LoraConfig(task_type="CAUSAL_LM", **LORA) for library in (peft, peft_fx)]
    models = [
        peft.get_peft_model(copy.deepcopy(base), configs[0]),
        peft_fx.get_peft_model(copy.deepcopy(base), configs[1]),
    ]
    assert models[0].get_nb_trainable_parameters() == models[1].get_nb_trainable_parameters()
    for model in models:
        model.print_trainable_parameters()
    first, second = capsys.readouterr().out.splitlines()
    assert first == second
    assert all(("lora_" in n) == p.requires_grad for n, p in models[1].named_parameters())


@EACH_FORM
@pytest.mark.slow
def test_adapters_come_go_and_take_turns(llamas, tmp_path):
    reference, model = llamas
    other = peft.get_peft_model(model_of("tied_llama"), peft.LoraConfig(task_type="CAUSAL_LM", **{**LORA, "r": 2}))
    other.save_pretrained(tmp_path / "other")
    first = logits(model)
    for m in llamas:
        m.load_adapter(tmp_path / "other", "other")
        assert m.active_adapter == "default"
        m.set_adapter("other")
        assert m.active_adapters == ["other"]
    second = logits(model)
    torch.testing.assert_close(second, logits(reference))
    assert (second - first).abs().max() > 0.01
    for m in llamas:
        m.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(logits(model), logits(reference))
    with pytest.warns(UserWarning, match="deleted"):
        model.set_adapter("other")
        model.delete_adapter("other")
    assert model.active_adapters == ["default"] and torch.equal(logits(model), first)
    model.add_adapter("other", peft_fx.LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False))
    model.set_adapter("other")  # another adapter of the same name: no graph of the one before
    assert not torch.equal(logits(model), second)


@EACH_FORM
@pytest.mark.slow
def test_adapters_of_several_types_act_together(tmp_path):
    base = model_of("tied_llama")
    model = peft_fx.get_peft_model(base, peft_fx.LoraConfig(**LORA), "lora", mixed=True)
    model.add_adapter("oft", peft_fx.OFTConfig(oft_block_size=4, target_modules=["q_proj", "o_proj"]))
    with torch.no_grad():
        for parameter in model.base_model.adapters.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.set_adapter(["lora", "oft"])
    model.save_pretrained(tmp_path)
    graph = peft_fx.capture(model_of("tied_llama"), kwargs=inputs("tied_llama"))
    for name in ("lora", "oft"):
        graph = peft_fx.load_adapter(graph, tmp_path / name, name)
    together = logits(model.eval())
    torch.testing.assert_close(together, logits(peft_fx.set_adapter(graph, ["lora", "oft"])))
    torch.testing.assert_close(model.merge_and_unload()(**inputs("tied_llama")).logits, together, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_disabled_inside_the_block(llamas):
    _, model = llamas
    before = logits(model)
    for merged in (False, True):
        if merged:
            model.merge_adapter()
        with model.disable_adapter():
            assert torch.equal(logits(model), logits(model_of("tied_llama")))
    model.unmerge_adapter()
    assert torch.equal(logits(model), before)


@EACH_FORM
@pytest.mark.slow
@pytest.mark.parametrize("target_modules", ["all-linear", ["embed_tokens", "q_proj"]], ids=["linear", "tied"])
def test_merging_gives_what_peft_gives_and_unmerging_changes_no_bit(tmp_path, target_modules):
    reference, model = pair("tied_llama", tmp_path, target_modules=target_modules)
    weights = {n: t.clone() for n, t in peft_fx.get_base_model_state_dict(model).items()}
    before = logits(model)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(model), before)
    assert model.merged_adapters == ("default",)
    model.unmerge_adapter()
    now = peft_fx.get_base_model_state_dict(model)
    assert weights.keys() == now.keys() and all(torch.equal(t, now[n]) for n, t in weights.items())
    assert torch.equal(logits(model), before)
    plain = model.merge_and_unload()
    assert type(plain) is type(model_of("tied_llama")) and plain.state_dict().keys() == weights.keys()
    torch.testing.assert_close(plain(**inputs("tied_llama")).logits, logits(reference))


@pytest.mark.slow
def test_a_merge_that_is_not_finite_changes_nothing(llamas):
    _, model = llamas
    before = {n: t.clone() for n, t in peft_fx.get_base_model_state_dict(model).items()}
    with torch.no_grad():
        list(model.base_model.adapters.parameters())[-1].fill_(float("inf"))
    with pytest.raises(peft_fx.MergeError, match="inf or nan"):
        model.merge_adapter(safe_merge=True)
    assert all(torch.equal(t, before[n]) for n, t in peft_fx.get_base_model_state_dict(model).items())
    assert model.merged_adapters == ()


@pytest.mark.slow
def test_a_copy_has_adapters_of_its_own(llamas):
    _, model = llamas
    new, before = copy.deepcopy(model), logits(model)
    assert torch.equal(logits(new), before)
    with torch.no_grad():
        for parameter in new.base_model.adapters.parameters():
            parameter.mul_(2)
    changed = logits(new)
    assert not torch.equal(changed, before) and torch.equal(logits(model), before)
    new.merge_adapter()
    torch.testing.assert_close(logits(new), changed)


# Files


@pytest.mark.slow
def test_files_go_to_peft_and_back(llamas, tmp_path):
    reference, model = llamas
    model.add_adapter("second", peft_fx.LoraConfig(**LORA))
    model.save_pretrained(tmp_path / "saved")
    back = peft.PeftModel.from_pretrained(model_of("tied_llama"), tmp_path / "saved")
    torch.testing.assert_close(logits(back), logits(reference))
    back.load_adapter(tmp_path / "saved" / "second", "second")
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "library_name: peft" in card and "- lora" in card and "pipeline_tag: text-generation" in card
    model.save_pretrained(tmp_path / "one", selected_adapters=["second"])
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == ["README.md", "second"]


@pytest.mark.slow
def test_an_adapter_in_memory(llamas):
    reference, model = llamas
    found, expected = peft_fx.get_peft_model_state_dict(model), peft.get_peft_model_state_dict(reference)
    assert found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in found)
    peft_fx.set_peft_model_state_dict(model, {k: 2 * v for k, v in expected.items()})
    peft.set_peft_model_state_dict(reference, {k: 2 * v for k, v in expected.items()})
    torch.testing.assert_close(logits(model), logits(reference))
    before = logits(model)
    first, *others = expected
    report = peft_fx.set_peft_model_state_dict(model, {k: 3 * expected[k] for k in others})
    assert report.missing_keys == [first] and torch.equal(peft_fx.get_peft_model_state_dict(model)[first], found[first])
    assert not torch.equal(logits(model), before)


@pytest.mark.slow
def test_a_swap_from_a_file_compiles_nothing(llamas, tmp_path):
    _, model = llamas
    other = peft.get_peft_model(model_of("tied_llama"), peft.LoraConfig(task_type="CAUSAL_LM", **{**LORA, "r": 2}))
    other.save_pretrained(tmp_path / "other")
    logits(model)
    with torch.compiler.set_stance("fail_on_recompile"):
        peft_fx.hotswap_adapter(model, tmp_path / "other", "default")
        torch.testing.assert_close(logits(model), logits(other))


@pytest.mark.slow
def test_the_base_model_is_found_from_the_files(tmp_path):
    base = model_of("tied_llama")
    base.save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = peft_fx.get_peft_model(base, peft_fx.LoraConfig(task_type=peft_fx.TaskType.CAUSAL_LM, **LORA))
    model.save_pretrained(tmp_path / "adapter")
    found = peft_fx.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits(found), logits(model.eval()))
    with pytest.raises(ValueError, match="Expected target PEFT task type: SEQ_CLS"):
        peft_fx.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter")


@pytest.mark.slow
def test_status_says_what_pefts_says(llamas):
    reference, model = llamas
    found, expected = peft_fx.get_model_status(model), peft.get_model_status(reference)
    same = ("base_model_type", "trainable_params", "total_params", "num_adapter_layers", "enabled", "active_adapters",
            "merged_adapters", "requires_grad", "available_adapters", "devices")  # fmt: skip
    assert [getattr(found, n) for n in same] == [getattr(expected, n) for n in same]
    layers = {r.name: r for r in peft_fx.get_layer_status(model)}
    for record in peft.get_layer_status(reference):
        assert layers[record.name].requires_grad == record.requires_grad
        assert layers[record.name].devices == record.devices


def test_configs_are_written_and_read_as_pefts(tmp_path):
    config = peft_fx.LoraConfig(task_type=peft_fx.TaskType.CAUSAL_LM, **LORA)
    config.save_pretrained(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["adapter_config.json"]
    theirs, ours = peft.PeftConfig.from_pretrained(tmp_path), peft_fx.PeftConfig.from_pretrained(tmp_path)
    assert (theirs.r, theirs.task_type, theirs.peft_type) == (4, "CAUSAL_LM", "LORA")
    assert ours == config == peft_fx.LoraConfig.from_pretrained(tmp_path) and isinstance(ours, peft_fx.PeftConfig)
    assert ours.peft_type == peft_fx.PeftType.LORA and not ours.is_prompt_learning
    with pytest.warns(UserWarning, match="inference_mode: the file's values are taken, not those that are given"):
        assert peft_fx.PeftConfig.from_pretrained(tmp_path, inference_mode=True, revision="main") == config
    with pytest.raises(peft_fx.RecipeError, match="expected a IA3Config, got a LoraConfig"):
        peft_fx.IA3Config.from_pretrained(tmp_path)
    with pytest.raises(peft_fx.AdapterFileError, match="has no adapter_config.json"):
        peft_fx.PeftConfig.from_pretrained(tmp_path.parent)


# Trainer


class Sentences(Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, i):
        ids = torch.randint(0, 20, (7,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": ids, "unused": 3}


def train(model, folder, resume=None, **options):
    arguments = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=4, max_steps=4, save_steps=2, logging_steps=1, learning_rate=1e-2,
        report_to=[], use_cpu=True, disable_tqdm=True, seed=7, **options)  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=Sentences(), eval_dataset=Sentences())
    trainer.train(resume_from_checkpoint=resume)
    return [h["loss"] for h in trainer.state.log_history if "loss" in h], trainer


WAYS_TO_TRAIN = {
    "plain": {},
    "checkpointing": {"gradient_checkpointing": True},
    "reentrant checkpointing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "accumulation": {"gradient_accumulation_steps": 2},
    "bf16": {"bf16": True},
    "compiled": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
}


@pytest.mark.slow
@pytest.mark.parametrize("options", WAYS_TO_TRAIN.values(), ids=WAYS_TO_TRAIN)
def test_a_trainers_losses_are_pefts_and_it_resumes(tmp_path, options, activation_form):
    """In the form that real sizes take: the other rounds W + BA to bf16 under autocast, PEFT rounds W and BA x."""
    reference, model = pair("tied_llama", tmp_path / "adapter", is_trainable=True)
    expected, _ = train(reference, tmp_path / "theirs", **options)
    found, trainer = train(model, tmp_path / "ours", **options)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), atol=1e-5, rtol=0)
    _, again = pair("tied_llama", tmp_path / "adapter", is_trainable=True)
    resumed, other = train(again, tmp_path / "ours", resume=str(tmp_path / "ours" / "checkpoint-2"), **options)
    assert resumed == found
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    loaded = peft.PeftModel.from_pretrained(model_of("tied_llama"), tmp_path / "ours" / "checkpoint-4")
    written, kept = peft.get_peft_model_state_dict(loaded), peft_fx.get_peft_model_state_dict(model)
    assert written.keys() == kept.keys() and all(torch.equal(written[k], kept[k]) for k in written)
    assert trainer.evaluate()["eval_loss"] == other.evaluate()["eval_loss"]


@pytest.mark.slow
def test_a_trainer_where_peft_is_not_installed_resumes_too(tmp_path, monkeypatch):
    """It takes the model for one of transformers' own."""
    _, model = pair("tied_llama", tmp_path / "adapter", is_trainable=True)
    _, again = pair("tied_llama", tmp_path / "adapter", is_trainable=True)
    monkeypatch.delitem(sys.modules, "peft")
    assert not isinstance(model, peft.PeftModel) and isinstance(model, transformers.PreTrainedModel)
    found, _ = train(model, tmp_path / "ours")
    assert train(again, tmp_path / "ours", resume=str(tmp_path / "ours" / "checkpoint-2"))[0] == found
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.slow
def test_a_trainer_loads_its_best_model(tmp_path):
    _, model = pair("tied_llama", tmp_path / "adapter", is_trainable=True)
    _, trainer = train(model, tmp_path / "run", eval_strategy="steps", eval_steps=2, load_best_model_at_end=True)
    best = peft.PeftModel.from_pretrained(model_of("tied_llama"), trainer.state.best_model_checkpoint)
    torch.testing.assert_close(logits(model.eval()), logits(best.eval()))


def test_transformers_counts_are_over_the_adapters_too_as_with_peft(llamas):
    theirs, ours = llamas
    for count in (
        lambda m: m.num_parameters(),
        lambda m: m.num_parameters(only_trainable=True),
        lambda m: m.num_parameters(exclude_embeddings=True),
        lambda m: m.get_memory_footprint(return_buffers=False),
    ):
        assert count(ours) == count(theirs)


# Refusals


def test_refusals(llamas, tmp_path):
    _, model = llamas
    with pytest.raises(ValueError, match="nowhere"):
        model.set_adapter("nowhere")
    with pytest.raises(TypeError, match="single string"):
        model.set_adapter(["default"])
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        model.add_adapter("x", peft_fx.IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    with pytest.raises(ValueError, match="already"):
        model.add_adapter("default", peft_fx.LoraConfig(**LORA))
    with pytest.raises(ValueError, match="no adapter 'x' to save"):
        model.save_pretrained(tmp_path, selected_adapters=["x"])
    with pytest.raises(ValueError, match="nothing to adapt"):
        peft_fx.get_peft_model(model_of("bert"), peft_fx.LoraConfig(target_modules=["not_there"]))
    with pytest.raises(ValueError, match="task_type='NOTHING'"):
        peft_fx.get_peft_model(model_of("bert"), peft_fx.LoraConfig(task_type="NOTHING"))
    with pytest.raises(ValueError, match="has adapters already"):
        peft_fx.get_peft_model(model, peft_fx.LoraConfig(**LORA))
    with pytest.raises(TypeError, match="expected a PeftModel"):
        peft_fx.get_layer_status(model_of("bert"))
    with pytest.raises(AttributeError, match="no attribute 'NotThere'"):
        peft_fx.NotThere  # noqa: B018
