"""PEFT's helpers beside PEFT's own, and its names: each is here, or stands in a table with the reason why not."""

import copy
import importlib
import inspect
import warnings

import peft
import peft.functional
import peft.helpers
import peft.optimizers
import peft.utils
import peft.utils.constants
import pytest
import torch
from graphs import captured, inputs, model_of
from safetensors.torch import save_file
from torch import nn

import peft_fx
from peft_fx import functional, helpers, utils

LORA = dict(r=4, lora_alpha=32, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


def both(folder, name="biased_llama", adapters=("default",), **config):
    """(PEFT's model, ours) with the same adapters."""
    reference = None
    for adapter in adapters:
        new = peft.LoraConfig(task_type="CAUSAL_LM", **{**LORA, **config})
        if reference is None:
            reference = peft.get_peft_model(model_of(name), new, adapter)
        else:
            reference.add_adapter(adapter, new)
    with torch.no_grad():
        for n, p in reference.named_parameters():
            if "modules_to_save" in n:
                p.add_(0.1)
    reference.save_pretrained(folder)
    models = []
    for library in (peft, peft_fx):
        model = library.PeftModel.from_pretrained(model_of(name), folder, is_trainable=True)
        for adapter in adapters[1:]:
            model.load_adapter(folder / adapter, adapter)
        models.append(model.eval())
    return models


def logits(model):
    return model(**inputs("biased_llama")).logits


# Names

# reason -> names of PEFT's that have no counterpart
REASONS = {
    "prompt methods: later": """
        AdaptionPromptConfig CPTConfig CPTEmbedding CartridgeConfig CartridgeEncoder MultitaskPromptTuningConfig
        MultitaskPromptTuningInit PrefixEncoder PrefixTuningConfig PromptEmbedding PromptEncoder PromptEncoderConfig
        PromptEncoderReparameterizationType PromptLearningConfig PromptTuningConfig PromptTuningInit
        AdaptionPromptModel TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING _get_batch_size _prepare_prompt_learning_config
        bloom_model_postprocess_past_key_value compose_cartridge_adapters initialize_kv_prefix_from_past_key_values
        initialize_kv_prefix_from_text map_cache_to_layer_device_map prompt_embeddings_from_past_key_values""",
    "methods and variants of LoRA that are missing: later": """
        ArrowConfig BdLoraConfig KasaConfig MontecloraConfig MontecloraTrainerMixin PolyConfig ShadowConfig
        PolyModel ShadowModel TRANSFORMERS_MODELS_TO_POLY_TARGET_MODULES_MAPPING VeloraConfig XLoraConfig XLoraModel
        create_arrow_model""",
    "initialisations from data, or that change the base weight: later": """
        EvaConfig LoftQConfig LoraGAConfig get_eva_state_dict initialize_lora_eva_weights preprocess_loraga
        replace_lora_weights_loftq""",
    "other methods as LoRA files: later": "convert_to_lora save_as_lora",
    "weights that move to a GPU for a moment: later": "LoraRuntimeConfig",
    "packed base weights: later": """
        get_gptqmodel_quant_linear get_quantization_config get_quantization_kwargs quantization_extra_repr
        resolve_quantization_backend""",
    "methods of one's own: @peft_fx.method": "register_peft_method",
    "what PEFT's layer classes are made with": """
        AuxiliaryTrainingWrapper DUMMY_MODEL_CONFIG MIN_TARGET_MODULES_FOR_OPTIMIZATION ModulesToSaveWrapper
        TrainableTokensWrapper _freeze_adapter _get_input_embeddings_name _get_submodules _is_valid_match _set_adapter
        _set_trainable id_tensor_storage set_additional_trainable_modules transpose""",
}
NO_PLACE = {name for names in REASONS.values() for name in names.split()}
# submodule -> its public names
PUBLIC = {
    "": peft.__all__,
    "utils": peft.utils.__all__,
    "functional": peft.functional.__all__,
    "optimizers": peft.optimizers.__all__,
    "helpers": [n for n, v in vars(peft.helpers).items() if getattr(v, "__module__", "") == "peft.helpers"],
    "utils.constants": [n for n in vars(peft.utils.constants) if n.isupper()],
}


@pytest.mark.parametrize("submodule", PUBLIC)
def test_every_name_of_pefts_is_here_or_has_a_reason(submodule):
    ours = importlib.import_module(f"peft_fx.{submodule}".rstrip("."))
    here = {name for name in PUBLIC[submodule] if hasattr(ours, name)}
    assert [n for n in PUBLIC[submodule] if n not in here | NO_PLACE] == []
    assert sorted(here & NO_PLACE) == [], "no longer missing: take it out of the table"


def test_no_reason_is_left_over():
    names = {n for names in PUBLIC.values() for n in names}
    assert sorted(NO_PLACE - names) == []


@pytest.mark.parametrize("line", [
    "from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict, CONFIG_NAME, PeftType",
    "from peft.utils.save_and_load import load_peft_weights, get_peft_model_state_dict",
    "from peft.utils.other import prepare_model_for_kbit_training, shift_tokens_right, SAFETENSORS_WEIGHTS_NAME",
    "from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING",
    "from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap",
    "from peft.helpers import rescale_adapter_scale, check_if_peft_model, DoraCaching, update_signature",
    "from peft.functional import set_adapter, delete_adapter, set_requires_grad, cast_adapter_dtype",
    "from peft.optimizers import create_loraplus_optimizer, create_lorafa_optimizer, create_riemannian_optimizer",
    "from peft.optimizers.lorafa import LoraFAOptimizer",
    "from peft.tuners import LoraConfig, IA3Config, AdaLoraConfig",
    "from peft.tuners.lora import LoraConfig",
    "from peft.tuners.ia3 import IA3Config",
    "from peft.tuners.trainable_tokens import TrainableTokensConfig",
    "from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, get_peft_config, inject_adapter_in_model",
    "from peft.mapping_func import get_peft_model",
    "from peft.peft_model import PeftModel, PeftModelForCausalLM, get_layer_status",
    "from peft.auto import AutoPeftModelForCausalLM",
    "import peft.utils.save_and_load as found; found.load_peft_weights",
])  # fmt: skip
def test_imports_from_submodules_move(line):
    for library in ("peft", "peft_fx"):
        exec(line.replace("peft", library, 1), {})


def test_submodules_are_modules_like_others():
    assert importlib.util.find_spec("peft_fx.tuners.lora") is not None and peft_fx.utils is utils
    assert importlib.import_module("peft_fx.tuners.lora").LoraConfig is peft_fx.LoraConfig
    assert functional.set_adapter is not peft_fx.set_adapter
    assert importlib.reload(peft_fx).utils is utils
    for module, name in ((utils, "nothing"), (peft_fx.tuners.lora, "IA3")):
        with pytest.raises(AttributeError, match=f"no attribute '{name}'"):
            getattr(module, name)
    with pytest.raises(ImportError):
        importlib.import_module("peft_fx.utils.nothing")


@pytest.mark.parametrize("name", [n for n in PUBLIC["utils.constants"] if hasattr(utils, n)])
def test_constants_are_pefts(name):
    assert getattr(utils, name) == getattr(peft.utils.constants, name)


def test_tables_are_pefts():
    mine, theirs = peft_fx.PEFT_TYPE_TO_CONFIG_MAPPING, peft.PEFT_TYPE_TO_CONFIG_MAPPING
    assert {t.value: c.__name__ for t, c in mine.items()}.items() <= {
        t.value: c.__name__ for t, c in theirs.items()
    }.items()
    mine, theirs = peft_fx.MODEL_TYPE_TO_PEFT_MODEL_MAPPING, peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING
    assert {str(t): c.__name__ for t, c in mine.items()} == {t: c.__name__ for t, c in theirs.items()}
    assert mine["CAUSAL_LM"] is peft_fx.PeftModelForCausalLM
    data = {"peft_type": "LORA", "r": 3, "task_type": "CAUSAL_LM", "target_modules": ["q"]}
    mine, theirs = (library.get_peft_config(dict(data)) for library in (peft_fx, peft))
    assert type(mine) is peft_fx.LoraConfig and (mine.r, mine.task_type) == (theirs.r, theirs.task_type)


def test_errors_are_caught_by_pefts_names():
    with pytest.raises(peft_fx.NoMatchingPeftModuleError):
        peft_fx.get_peft_model(model_of("bert"), peft_fx.LoraConfig(target_modules=["nowhere"]))
    for error in (peft_fx.AdapterFileError, peft_fx.RecipeError, peft_fx.GraphError):
        assert issubclass(error, peft_fx.PeftError)
    assert issubclass(peft_fx.PeftWarning, UserWarning)


# Helpers


def test_signatures_are_the_models(tmp_path):
    _, model = both(tmp_path)
    base = type(model.get_base_model())
    with pytest.raises(ValueError, match="expected one of"):
        helpers.update_signature(model, "call")
    expected, tokens = logits(model), dict(max_new_tokens=3, do_sample=False, pad_token_id=0)
    generated = model.generate(**inputs("biased_llama"), **tokens)
    helpers.update_signature(model)
    for name in ("forward", "generate"):
        mine, theirs = getattr(model, name), getattr(base, name)
        assert [*inspect.signature(mine).parameters] == [*inspect.signature(theirs).parameters][1:]
        assert mine.__doc__ == theirs.__doc__
    assert torch.equal(logits(model), expected)
    assert torch.equal(model.generate(**inputs("biased_llama"), **tokens), generated)
    other = copy.deepcopy(model)  # whose methods are its own
    assert other.generate.__self__ is other and other.forward.__self__ is other
    bare = peft_fx.get_peft_model(nn.Sequential(nn.Linear(4, 4)), peft_fx.LoraConfig(target_modules=["0"]))
    helpers.update_signature(bare)  # no generate: nothing happens to it
    assert not hasattr(bare.get_base_model(), "generate")


def test_an_adapter_is_known_by_its_config(tmp_path):
    both(tmp_path / "adapter")
    for folder in (tmp_path / "adapter", tmp_path, tmp_path / "nowhere"):
        assert helpers.check_if_peft_model(folder) == peft.helpers.check_if_peft_model(str(folder))


@pytest.mark.parametrize("config", [{}, dict(use_rslora=True, rank_pattern={"v_proj": 2}), dict(use_dora=True)])
def test_scales_are_changed_inside_the_block_only(tmp_path, config):
    reference, model = both(tmp_path, **config)
    before = logits(model)
    for multiplier in (0, 0.5, 3):
        with (
            helpers.rescale_adapter_scale(model, multiplier),
            peft.helpers.rescale_adapter_scale(reference, multiplier),
        ):
            torch.testing.assert_close(logits(model), logits(reference))
            assert not torch.equal(logits(model), before)
        assert torch.equal(logits(model), before)
    with pytest.raises(ZeroDivisionError), helpers.rescale_adapter_scale(model, 3):
        1 / 0  # noqa: B018
    assert torch.equal(logits(model), before)


@pytest.mark.slow
def test_scales_of_graphs_and_backends(tmp_path):
    _, model = both(tmp_path)
    graph = peft_fx.load_adapter(captured("biased_llama"), tmp_path)
    base = model_of("biased_llama")
    backend = peft_fx.backend(tmp_path, model=base)
    compiled = torch.compile(base, backend=backend)
    with helpers.rescale_adapter_scale(model, 0.3):
        expected = logits(model)
    for holder, called in ((graph, graph), (backend, compiled)):
        before = logits(called)
        with helpers.rescale_adapter_scale(holder, 0.3), torch.compiler.set_stance("fail_on_recompile"):
            torch.testing.assert_close(logits(called), expected)
        assert torch.equal(logits(called), before)
    with pytest.raises(TypeError, match="multiplier"), helpers.rescale_adapter_scale(model, "1"):
        pass
    other = peft_fx.get_peft_model(
        model_of("bert"), peft_fx.IA3Config(target_modules=["query"], feedforward_modules=[])
    )
    with pytest.raises(ValueError, match="no LoRA adapter"), helpers.rescale_adapter_scale(other, 1):
        pass


def test_switches_that_have_nothing_to_switch(tmp_path):
    reference, model = both(tmp_path, use_dora=True)
    caching = helpers.DoraCaching()
    caching(enabled=False)
    with caching, helpers.disable_input_dtype_casting(model), helpers.disable_input_dtype_casting(model, active=False):
        torch.testing.assert_close(logits(model), logits(reference))


def test_labels_are_shifted_as_in_peft():
    labels = torch.tensor([[5, 6, -100], [7, 8, 9]])
    assert torch.equal(peft_fx.shift_tokens_right(labels, 0, 2), peft.shift_tokens_right(labels, 0, 2))
    with pytest.raises(ValueError, match="pad_token_id"):
        peft_fx.shift_tokens_right(labels, None, 2)


@pytest.mark.parametrize("name", ["llama", "mixtral", "tied_llama"])
def test_kappa_chooses_what_peft_chooses(name):
    model = model_of(name)
    for options in ({}, {"top_p": 0.5}, {"max_dim_size_to_analyze": 20}):
        found = peft_fx.find_kappa_target_modules(model, show_progress=False, **options)
        assert found == peft.find_kappa_target_modules(model, show_progress=False, **options)
    mine, theirs = (library.KappaTuneSelector(model, show_progress=False) for library in (helpers, peft.helpers))
    for options in ({"num_modules": 3}, {"threshold": 20.0}, {}):
        assert mine.get_best_targets(**options) == theirs.get_best_targets(**options)
        assert mine.get_best_target_parameters(**options) == theirs.get_best_target_parameters(**options)
    packed = nn.Linear(4, 4)
    packed.weight = nn.Parameter(packed.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="packed by a quantisation"):
        peft_fx.find_kappa_target_modules(nn.Sequential(packed), show_progress=False)


# Precision


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


# Weights


def test_weights_are_loaded_as_by_peft(tmp_path):
    both(tmp_path, adapters=("default", "other"))
    mapping = {r"layers\.(\d+)": r"blocks.\1", "self_attn": "never"}
    for options in ({}, {"device": "cpu"}, {"subfolder": "other"}, {"key_mapping": mapping}):
        found, expected = (library.load_peft_weights(str(tmp_path), **options) for library in (peft_fx, peft))
        assert found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in found)
    with pytest.raises(peft_fx.AdapterFileError):
        peft_fx.load_peft_weights(str(tmp_path / "nowhere"))


def test_the_models_own_weights_have_its_own_names(tmp_path):
    reference, model = both(tmp_path, modules_to_save=["lm_head"])
    found, expected = (library.get_base_model_state_dict(m) for library, m in ((peft_fx, model), (peft, reference)))
    assert found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in found)
    other = {k: 2 * t for k, t in found.items()}
    for library, m in ((peft, reference), (peft_fx, model)):
        result = library.set_base_model_state_dict(m, other)
        assert (list(result.missing_keys), list(result.unexpected_keys)) == ([], [])
        some = {**dict(list(other.items())[1:]), "more": torch.ones(1)}
        result = library.set_base_model_state_dict(m, some, strict=False)
        assert (list(result.missing_keys), list(result.unexpected_keys)) == ([next(iter(other))], ["more"])
        with pytest.raises(RuntimeError, match="more"):
            library.set_base_model_state_dict(m, some)
    torch.testing.assert_close(logits(model), logits(reference))
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        peft_fx.set_base_model_state_dict(model, found)


def differ(found, expected):
    return [k for k in found.keys() | expected.keys() if not torch.equal(found[k], expected[k])]


def test_an_adapters_numbers_are_set_as_by_peft(tmp_path):
    reference, model = both(tmp_path, modules_to_save=["lm_head"])
    start = peft.get_peft_model_state_dict(reference)
    lora = [k for k in start if "lora_" in k]
    new = {k: torch.full_like(t, 0.1 * i) for i, (k, t) in enumerate(start.items())}
    cases = {
        "whole": new,
        "without one": {k: t for k, t in new.items() if k != lora[0]},
        "with one more": new | {"base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": torch.ones(4, 16)},
        "with a strange one": new | {"nothing.of.ours": torch.ones(1)},
    }
    for numbers in cases.values():
        results = []
        for library, m in ((peft, reference), (peft_fx, model)):
            library.set_peft_model_state_dict(m, start)
            result = library.set_peft_model_state_dict(m, numbers)
            adapter = [k.replace(".default", "") for k in result.missing_keys if "lora_" in k]
            results.append((sorted(adapter), [k.replace(".default", "") for k in result.unexpected_keys]))
            assert numbers.keys() == {*numbers}, "the caller's dict is as it was"
        assert results[0] == results[1]
        assert not differ(peft_fx.get_peft_model_state_dict(model), peft.get_peft_model_state_dict(reference))


def test_sizes_that_do_not_fit(tmp_path):
    reference, model = both(tmp_path)
    start = peft.get_peft_model_state_dict(reference)
    key, *others = start
    new = {k: t + 1 for k, t in start.items()} | {key: torch.ones(1, 16)}
    for library, m in ((peft, reference), (peft_fx, model)):
        with pytest.raises((RuntimeError, peft_fx.AdapterFileError), match=r"shape"):
            library.set_peft_model_state_dict(m, new)
        with pytest.warns(UserWarning, match="shape"):
            result = library.set_peft_model_state_dict(m, new, ignore_mismatched_sizes=True)
        assert key in [k.replace(".default", "") for k in result.missing_keys]
        kept = library.get_peft_model_state_dict(m)
        assert torch.equal(kept[key], start[key]) and all(torch.equal(kept[k], new[k]) for k in others)
    with pytest.raises(ValueError, match="nowhere"):
        peft_fx.set_peft_model_state_dict(model, start, "nowhere")


def test_numbers_from_a_state_dict(tmp_path):
    reference, model = both(tmp_path, adapters=("default", "other"), modules_to_save=["lm_head"])
    found, expected = [], []
    for library, m, results in ((peft_fx, model, found), (peft, reference, expected)):
        kept = {k: t.clone() for k, t in m.state_dict().items()}
        with torch.no_grad():
            for p in m.parameters():
                p.zero_()
        for name in ("default", "other"):
            results.append(library.get_peft_model_state_dict(m, state_dict=kept, adapter_name=name))
            assert not any(t.any() for t in library.get_peft_model_state_dict(m, adapter_name=name).values())
    for a, b in zip(found, expected, strict=True):
        assert not differ(a, b) and any(t.any() for t in a.values())
    with pytest.raises(ValueError, match="no key that begins with"):
        peft_fx.get_peft_model_state_dict(model, state_dict={})


def test_bare_pieces_of_a_tensor_are_set(tmp_path):
    """AdaMSS files a tensor per cluster: what is left out stays."""
    config = peft_fx.AdamssConfig(r=4, num_subspaces=2, subspace_rank=1, target_modules=["q_proj"])
    model = peft_fx.get_peft_model(model_of("llama"), config)
    start = {k: t.clone() for k, t in peft_fx.get_peft_model_state_dict(model).items()}
    key = next(k for k, t in start.items() if t.is_floating_point() and t.numel() and "adamss_" in k)
    result = peft_fx.set_peft_model_state_dict(model, {key: start[key] + 1})
    now = peft_fx.get_peft_model_state_dict(model)
    assert differ(now, start) == [key] and sorted(result.missing_keys) == sorted(start.keys() - {key})


def test_embeddings_go_along_as_in_peft(tmp_path):
    reference, model = both(tmp_path)
    for option in (True, False, "auto"):
        found, expected = (
            library.get_peft_model_state_dict(m, save_embedding_layers=option)
            for library, m in ((peft_fx, model), (peft, reference))
        )
        assert not differ(found, expected)
    new = {k: t + 1 for k, t in peft.get_peft_model_state_dict(reference, save_embedding_layers=True).items()}
    for library, m in ((peft, reference), (peft_fx, model)):
        result = library.set_peft_model_state_dict(m, new)
        assert list(result.unexpected_keys) == []
    torch.testing.assert_close(logits(model), logits(reference))


def test_a_model_that_adapters_were_injected_into(tmp_path):
    """Its keys have no base_model.model. in front."""
    both(tmp_path)
    models = []
    for library in (peft, peft_fx):
        models.append(library.inject_adapter_in_model(library.LoraConfig(**LORA), model_of("biased_llama")).eval())
        result = library.set_peft_model_state_dict(models[-1], library.load_peft_weights(str(tmp_path)))
        assert list(result.unexpected_keys) == [] and not any("lora_" in k for k in result.missing_keys)
    reference, model = models
    torch.testing.assert_close(logits(model), logits(reference))
    found, expected = (library.get_peft_model_state_dict(m) for library, m in ((peft_fx, model), (peft, reference)))
    assert not differ(found, expected) and not any(k.startswith("base_model") for k in found)
    results = []
    for library, m in ((peft, reference), (peft_fx, model)):
        some = dict(list(expected.items())[1:])
        missing = library.set_peft_model_state_dict(m, some).missing_keys
        status = library.get_model_status(m)
        results.append((
            [k.replace(".default", "") for k in missing if "lora_" in k], status.adapter_model_type, status.base_model_type,
            status.trainable_params, sorted(r.name for r in library.get_layer_status(m)),
        ))  # fmt: skip
    assert results[0] == results[1]
    kept = {k: t.clone() for k, t in model.state_dict().items()}
    functional.set_requires_grad(model, "default", False)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert not differ(peft_fx.get_peft_model_state_dict(model, state_dict=kept), expected)
    with helpers.rescale_adapter_scale(model, 2):
        assert logits(model).isfinite().all()


# Which adapters act


def test_adapters_act_train_and_go_as_in_peft(tmp_path):
    models = both(tmp_path, adapters=("default", "other"), modules_to_save=["lm_head"])
    reference, model = models
    with torch.no_grad():
        torch.manual_seed(0)
        for n, p in reference.named_parameters():
            if ".other" in n:
                p.add_(0.1 * torch.randn_like(p))
    peft_fx.set_peft_model_state_dict(
        model, peft.get_peft_model_state_dict(reference, adapter_name="other"), adapter_name="other"
    )

    def trains(m):
        return {n for n in ("default", "other") for k, p in m.named_parameters() if f".{n}" in k and p.requires_grad}

    for name, options in (("other", {}), ("default", {"inference_mode": True}), (["other"], {})):
        for library, m in ((peft, reference), (peft_fx, model)):
            importlib.import_module(f"{library.__name__}.functional").set_adapter(m, name, **options)
        torch.testing.assert_close(logits(model), logits(reference))
        assert trains(model) == trains(reference)
    for names, flag in ((["default", "other"], True), ("default", False)):
        for library, m in ((peft, reference), (peft_fx, model)):
            importlib.import_module(f"{library.__name__}.functional").set_requires_grad(m, names, flag)
        assert trains(model) == trains(reference)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        left = [
            importlib.import_module(f"{library.__name__}.functional").delete_adapter(m, "other", prefix="lora_")
            for library, m in ((peft, reference), (peft_fx, model))
        ]
    assert left[0] == left[1] == ["default"]
    torch.testing.assert_close(logits(model), logits(reference))


def test_files_without_safetensors(tmp_path):
    """What PEFT wrote before safetensors is read as tensors only."""
    _, model = both(tmp_path)
    tensors = peft_fx.get_peft_model_state_dict(model)
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save(tensors, tmp_path / utils.WEIGHTS_NAME)
    assert not differ(peft_fx.load_peft_weights(tmp_path), tensors)
    save_file(tensors, tmp_path / utils.SAFETENSORS_WEIGHTS_NAME)
    assert not differ(peft_fx.load_peft_weights(tmp_path), tensors)
