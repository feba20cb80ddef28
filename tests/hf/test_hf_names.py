"""Every name of PEFT's is here, or stands in a table with the reason why not; imports from its submodules move."""

import importlib

import peft
import peft.functional
import peft.helpers
import peft.optimizers
import peft.utils
import peft.utils.constants
import pytest
from graphs import model_of

import peft_fx
from peft_fx import functional, utils

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
        DUMMY_MODEL_CONFIG MIN_TARGET_MODULES_FOR_OPTIMIZATION
        _freeze_adapter _get_input_embeddings_name _get_submodules _is_valid_match _set_adapter
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
