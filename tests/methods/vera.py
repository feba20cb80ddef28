"""VeRA in PEFT: Linear, Conv1D."""

PEFT = [
    ({"r": 4}, "wide wide_without_bias wide_Conv1D"),
    ({"r": 4, "d_initial": 0.5, "projection_prng_key": 7, "init_weights": False}, "wide"),
    ({"r": 4, "target_modules": ["q_proj", "up_proj"]}, "llama"),
    ({"r": 4, "target_modules": ["c_attn"]}, "gpt2"),
]
DEFINED = [
    (
        {"r": 4},
        "wide_embedding wide_conv1d wide_conv2d wide_conv2d_pointwise wide_conv2d_dilated wide_conv2d_grouped wide_conv3d",
    ),
]
REFUSED = [({"r": 4}, "wide_norm", "matrices"), ({"vera_dropout": 1.0}, "wide", "0 <= p < 1")]


def definition(W, b, tensors, options):
    A, B = tensors["/vera_A"][:, : W[0].numel()], tensors["/vera_B"][: len(W)]
    delta = tensors["vera_lambda_b"][:, None] * B @ (tensors["vera_lambda_d"][:, None] * A)
    return W + delta.reshape(W.shape), b
