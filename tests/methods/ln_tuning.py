"""LN tuning in PEFT: any module."""

EXCLUSIVE = True
PEFT = [
    ({}, "wide_norm wide wide_without_bias square wide_Conv1D wide_conv1d wide_conv2d wide_conv2d_pointwise"),
    ({}, "wide_conv2d_dilated wide_conv2d_grouped wide_conv3d wide_embedding"),
    ({"target_modules": ["norm"]}, "normed"),
    ({"target_modules": ["input_layernorm", "norm"]}, "llama"),
    ({"target_modules": ["ln_1", "ln_f"]}, "gpt2"),
    ({"target_modules": None}, "t5"),
]
REFUSED = [({"target_modules": ["attn"]}, "attention", "MultiheadAttention")]
