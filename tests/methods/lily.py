"""Lily in PEFT: Linear. The update depends on the input, so that there is no weight to define or to merge."""

PEFT = [
    ({"r": 4}, "wide wide_without_bias square"),
    ({"r": 4, "num_B": 3, "scaling": 0.5, "init_weights": False}, "wide"),
    ({"r": 4, "stride_A": 2, "target_modules": ["q_proj", "up_proj"]}, "llama"),
    ({"r": 4, "stride_A": 1, "target_modules": ["k_proj", "mlp.down_proj"]}, "llama"),
    ({"r": 4, "stride_A": 3, "target_modules": r".*\.(q|v)_proj"}, "llama"),
]
REFUSED = [
    (
        {"r": 4},
        "wide_conv1d wide_conv2d wide_conv2d_grouped wide_conv3d wide_embedding wide_norm",
        "linear layers: no weight",
    ),
    ({"r": 4, "num_B": 1}, "wide", "expected at least 2"),
    ({"r": 4, "stride_A": 0}, "wide", "expected at least 1"),
]
