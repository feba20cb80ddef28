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
BEFT_TARGETS = (
    (["v"], "t5 mt5"),
    (["value"], "roberta bert"),
    (["v_proj"], "opt gptj gpt_neo bart llama llama4 mistral mixtral phi gemma gemma2 gemma3_text qwen2 qwen3"),
    (["value_proj"], "deberta-v2"),
)
LN_TUNING_TARGETS = (
    (["input_layernorm", "post_attention_layernorm", "norm"], "llama mistral gemma"),
    (["input_layernorm", "post_attention_layernorm", "ln_f"], "bloom falcon"),
    (
        ["multi_modal_projector", "input_layernorm", "post_attention_layernorm", "norm", "embed_tokens", "lm_head"],
        "llava",
    ),
    (["layer_norm", "final_layer_norm"], "t5 mt5"),
    (["self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"], "bart"),
    (["ln_1", "ln_2", "ln_f"], "gpt2"),
    (["layernorm", "LayerNorm", "final_layer_norm", "self_attn_layer_norm"], "blip-2"),
    (["ln_1", "ln_f"], "gptj"),
    (["input_layernorm", "final_layernorm"], "phi"),
    (
        [
            "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm",
            "norm",
        ],
        "gemma2 gemma3_text",
    ),
    (["post_attention_layernorm"], "qwen2 qwen3"),
)  # fmt: skip
ATTENTION_AND_MLP = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj"]
OSF_TARGETS = (
    (ATTENTION_AND_MLP, "llama llama4 mistral mixtral gemma gemma2 gemma3_text qwen2 qwen3 phi"),
    (["c_attn", "c_proj"], "gpt2 gpt_bigcode"),
    (["query_key_value", "dense_4h_to_h"], "bloom gpt_neox falcon"),
    (["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"], "opt"),
    (["q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out"], "gptj"),
)
VBLORA_TARGETS = (
    (["q", "k", "v", "o", "wi", "wo"], "t5"),
    (["q", "k", "v", "o", "wi_0", "wi_1", "wo"], "mt5"),
    (["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"], "bart opt"),
    (["query_proj", "key_proj", "value_proj", "dense"], "deberta-v2"),
    (["c_attn"], "gpt2 gpt_bigcode"),
    (["query_key_value"], "bloom gpt_neox"),
    (["q_proj", "v_proj"], "gptj gpt_neo llama llama4 gemma gemma2 gemma3_text qwen2 qwen3"),
    (["query", "value"], "bert roberta"),
    (["in_proj"], "deberta"),
    (".*language_model\\..*\\.(q_proj|v_proj)", "gemma4"),
    (["q_proj", "k_proj", "v_proj", "o_proj"], "nemotron_h"),
)
ADALORA_TARGETS = (*VBLORA_TARGETS, (["query", "key", "value", "dense"], "roberta"))  # later entries win
FOURIERFT_TARGETS = (*LORA_TARGETS, (["mlp.c_proj"], "gpt2 gpt_bigcode"))
WAVEFT_TARGETS = tuple(row for row in FOURIERFT_TARGETS if row[1] not in ("btlm", "rwkv", "rwkv7"))
IA3_TARGETS = (
    (["k", "v", "wo"], "t5"),
    (["k", "v", "wi_1"], "mt5"),
    (["c_attn", "mlp.c_proj"], "gpt2 gpt_bigcode"),
    (["query_key_value", "mlp.dense_4h_to_h"], "bloom"),
    (["key", "value", "output.dense"], "roberta bert"),
    (["q_proj", "k_proj", "fc2"], "opt"),
    (["q_proj", "v_proj", "fc_out"], "gptj"),
    (["query_key_value", "dense_4h_to_h"], "gpt_neox RefinedWebModel RefinedWeb falcon"),
    (["q_proj", "v_proj", "c_proj"], "gpt_neo"),
    (["q_proj", "v_proj", "fc2"], "bart phi"),
    (["k_proj", "v_proj", "down_proj"], "llama mistral"),
    (["q_proj", "v_proj", "down_proj"], "llama4 gemma gemma2 gemma3_text qwen2 qwen3"),
    (["k_proj", "v_proj", "w2"], "mixtral"),
    (["key_proj", "value_proj", "output.dense"], "deberta-v2"),
    (["in_proj", "output.dense"], "deberta"),
)
IA3_FEEDFORWARD: tuple[tuple[list[str], str], ...] = (
    (["wo"], "t5"),
    ([], "mt5"),
    (["mlp.c_proj"], "gpt2 gpt_bigcode"),
    (["mlp.dense_4h_to_h"], "bloom"),
    (["output.dense"], "roberta bert deberta-v2 deberta"),
    (["fc2"], "opt bart phi"),
    (["fc_out"], "gptj"),
    (["dense_4h_to_h"], "gpt_neox RefinedWeb RefinedWebModel falcon"),
    (["c_proj"], "gpt_neo"),
    (["down_proj"], "llama llama4 mistral gemma gemma2 gemma3_text qwen2 qwen3"),
    (["w2"], "mixtral"),
)
# peft_type -> model type -> target_modules
DEFAULT_TARGETS: dict[str | None, dict[str | None, list[str] | str]] = {
    peft_type: {model: names for names, models in targets for model in models.split()}
    for peft_type, targets in {
        "ADALORA": ADALORA_TARGETS,
        "ADAMSS": (*LORA_TARGETS, (["query", "value"], "vit")),
        "BEFT": BEFT_TARGETS,
        "BOFT": LORA_TARGETS,
        "C3A": FOURIERFT_TARGETS,
        "DEFT": LORA_TARGETS,
        "DELORA": LORA_TARGETS,
        "FOURIERFT": FOURIERFT_TARGETS,
        "FROD": (*LORA_TARGETS, (["q_proj", "v_proj"], "phi"), (["query", "value"], "vit")),
        "GLORA": LORA_TARGETS,
        "GRALORA": LORA_TARGETS,
        "HIRA": LORA_TARGETS,
        "HRA": LORA_TARGETS,
        "IA3": IA3_TARGETS,
        "LN_TUNING": LN_TUNING_TARGETS,
        "LILY": LORA_TARGETS,
        "LOHA": LORA_TARGETS,
        "LOKR": LORA_TARGETS,
        "LORA": LORA_TARGETS,
        "MISS": LORA_TARGETS,
        "OFT": LORA_TARGETS,
        "OSF": OSF_TARGETS,
        "PEANUT": LORA_TARGETS,
        "PSOFT": LORA_TARGETS,
        "PVERA": (*LORA_TARGETS, (["q_proj", "v_proj"], "phi"), (["query", "value"], "dinov2")),
        "RANDLORA": LORA_TARGETS,
        "ROAD": LORA_TARGETS,
        "SHIRA": (*LORA_TARGETS, (["q_proj", "v_proj"], "phi")),
        "SUPERTUNING": LORA_TARGETS,
        "TINYLORA": LORA_TARGETS,
        "UNILORA": LORA_TARGETS,
        "VBLORA": VBLORA_TARGETS,
        "VERA": (*LORA_TARGETS, (["q_proj", "v_proj"], "phi")),
        "WAVEFT": WAVEFT_TARGETS,
    }.items()
}
# peft_type -> other field -> model type -> names, where the field is None
DEFAULT_NAMES: dict[str | None, dict[str, dict[str | None, list[str]]]] = {
    "IA3": {"feedforward_modules": {model: names for names, models in IA3_FEEDFORWARD for model in models.split()}}
}
# Types whose experts PEFT converts to target_parameters: naming target_parameters alone adds no default modules.
PARAMETERS_ALONE = frozenset({"mixtral"})

ALL_LINEAR = "all-linear"
NO_TARGETS = "dummy-target-modules"
# Heads that "all-linear" leaves out of a classifier without an output embedding.
CLASSIFIER_HEADS = ("score", "classifier")
# task type -> modules that get a trained copy, where the model has them
TASK_HEADS: dict[str | None, tuple[str, ...]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
# Their fused kernels read these weights past the module, so that an adapter would be ignored.
MAMBA_MODELS = frozenset({"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"})
MAMBA_MODULES = frozenset({"out_proj", "conv1d"})
MAMBA_REFUSES = frozenset({"LORA", "ADALORA", "XLORA", "RANDLORA"})
