"""TinyLoRA in PEFT: Linear, Conv1D, Embedding."""

SMALL = {"r": 3, "u": 5}
PEFT = [
    (SMALL, "wide wide_without_bias square wide_Conv1D wide_embedding"),
    ({"r": 20, "u": 5, "init_weights": "uniform", "projection_seed": 7}, "wide"),
    (SMALL | {"save_projection": False}, "wide wide_embedding"),
    (SMALL | {"target_modules": ["q_proj", "up_proj"], "weight_tying": 0.5}, "llama"),
    (SMALL | {"target_modules": ["q_proj", "up_proj"], "weight_tying": 1.0}, "llama"),
    (SMALL | {"target_modules": ["c_attn"], "save_projection": False}, "gpt2"),
]
DEFINED = [
    (SMALL, "wide_conv1d wide_conv2d wide_conv2d_pointwise wide_conv2d_dilated wide_conv2d_grouped wide_conv3d"),
]
REFUSED = [
    (SMALL, "wide_norm", "matrices"),
    (SMALL | {"weight_tying": 1.5}, "wide", "weight_tying"),
    (SMALL | {"init_weights": "svd"}, "wide", "uniform"),
]


def definition(W, b, tensors, options):
    A, B, P, v = (tensors[k] for k in ("tinylora_A", "tinylora_B", "tinylora_P", "/tinylora_v.0"))
    return W + (B @ sum(v[i] * P[i] for i in range(len(v))) @ A).reshape(W.shape), b
