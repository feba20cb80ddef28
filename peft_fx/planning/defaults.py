"""What PEFT assumes when a config does not say: default targets per model type, names with a special role."""

# target names -> model types (transformers' `model_type`)
LORA_TARGETS = (
    (["q", "v"], "t5 mt5"),
    (["q_proj", "v_proj"], "bart opt gptj gpt_neo llama llama4 mistral mixtral stablelm gemma gemma2 gemma3_text"),
    (["q_proj", "v_proj"], "qwen2 qwen3"),
    (["q", "v", "q_proj", "v_proj"], "blip-2"),
    (["c_attn"], "gpt2 gpt_bigcode"),
    (["query_key_value"], "bloom gpt_neox chatglm RefinedWebModel RefinedWeb falcon"),
    (["query", "value"], "bert roberta xlm-roberta electra layoutlm"),
    (["query_proj", "value_proj"], "deberta-v2"),
    (["in_proj"], "deberta"),
    (["Wqkv"], "mpt"),
    (["c_proj", "c_attn"], "btlm"),
    (["qkv_proj"], "codegen"),
    (["q_proj", "v_proj", "fc1", "fc2"], "phi"),
    (r".*language_model\..*\.(q_proj|v_proj)", "gemma4"),
    (["q_proj", "k_proj", "v_proj", "o_proj"], "nemotron_h"),
    (["key", "value", "receptance", "output"], "rwkv"),
    (["r_proj", "k_proj", "v_proj", "o_proj", "key", "value"], "rwkv7"),
)
# peft_type -> model type -> target_modules
DEFAULT_TARGETS = {
    "LORA": {model: names for names, models in LORA_TARGETS for model in models.split()},
}
# Types whose experts PEFT converts to target_parameters: naming target_parameters alone adds no default modules.
PARAMETERS_ALONE = frozenset({"mixtral"})

ALL_LINEAR = "all-linear"
NO_TARGETS = "dummy-target-modules"
# Heads that "all-linear" leaves out of a classifier without an output embedding.
CLASSIFIER_HEADS = ("score", "classifier")
# task type -> modules that get a trained copy, where the model has them
TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
# Their fused kernels read these weights past the module, so that an adapter would be ignored.
MAMBA_MODELS = frozenset({"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"})
MAMBA_MODULES = frozenset({"out_proj", "conv1d"})
MAMBA_REFUSES = frozenset({"LORA", "ADALORA", "XLORA", "RANDLORA"})
