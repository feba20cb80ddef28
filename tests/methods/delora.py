"""DeLoRA in PEFT: Linear."""

PEFT = [
    ({"r": 4}, "wide wide_without_bias square"),
    ({"r": 3, "delora_lambda": 4, "init_weights": False}, "wide"),
    (
        {
            "r": 4,
            "target_modules": ["q_proj", "down_proj"],
            "rank_pattern": {"down_proj": 2},
            "lambda_pattern": {"q_proj": 7},
        },
        "llama",
    ),
]
DEFINED = [
    (
        {"r": 4},
        "wide_Conv1D wide_conv1d wide_conv2d wide_conv2d_pointwise wide_conv2d_dilated wide_conv2d_grouped",
    ),
    ({"r": 4}, "wide_conv3d wide_embedding"),
]
REFUSED = [
    ({"r": 4}, "wide_norm", "matrix"),
    ({"r": 4, "rank_pattern": {"layer": 0}}, "wide", "rank_pattern"),
]


def definition(W, b, tensors, options):
    A, B = tensors["delora_A"].flatten(1), tensors["delora_B"]
    delta = 0
    for i in range(len(A)):
        length = A[i].norm().clamp(min=1e-4) * B[:, i].norm().clamp(min=1e-4)
        delta = delta + tensors["delora_lambda"] / len(A) / length * B[:, i, None] * A[i]
    return W + (delta * tensors["delora_w_norm"].flatten()).reshape(W.shape), b
