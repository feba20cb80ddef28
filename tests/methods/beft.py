"""BEFT in PEFT: Linear; it cannot merge where the base has no bias."""

PEFT = [
    ({}, "wide square"),
    ({"init_weights": False}, "wide"),
    ({"target_modules": ["v_proj"]}, "biased_llama"),
]
DEFINED = [
    ({}, "wide_without_bias wide_Conv1D wide_conv1d wide_conv2d wide_conv2d_pointwise wide_conv2d_dilated"),
    ({}, "wide_conv2d_grouped wide_conv3d wide_embedding wide_norm"),
]
REFUSED = [
    ({"target_modules": ["input_layernorm"]}, "llama", "LN_TUNING"),
    (
        {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"]},
        "mixtral",
        "experts in one parameter have none",
    ),
]


def definition(W, b, tensors, options):
    v = tensors["beft_bias"][0]
    if W.shape == (8, 16):  # the embedding, seen transposed
        return W + v[:, None], b
    return W, v if b is None else v + b
