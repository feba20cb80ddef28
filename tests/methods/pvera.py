"""PVeRA in PEFT: Linear, Conv1D. Here everything is the mean; tests/methods/test_pvera.py has the noise."""

PEFT = [
    ({"r": 4}, "wide wide_without_bias square wide_Conv1D"),
    ({"r": 4, "save_projection": False, "projection_prng_key": 7, "init_weights": False}, "wide"),
    ({"r": 3, "d_initial": 0.5, "pvera_dropout": 0.2, "generator_seed": 1}, "wide"),
    ({"r": 4, "target_modules": ["q_proj", "up_proj"]}, "llama"),
    ({"r": 4, "target_modules": ["c_attn"], "save_projection": False}, "gpt2"),
]
DEFINED = [
    (
        {"r": 4},
        "wide_embedding wide_conv1d wide_conv2d wide_conv2d_pointwise wide_conv2d_dilated wide_conv2d_grouped wide_conv3d",
    ),
    ({"r": 4, "generator_seed": 3, "pvera_dropout": 0.2}, "wide_conv2d_grouped wide_embedding"),
]
REFUSED = [({"r": 4}, "wide_norm", "matrices"), ({"r": 4, "pvera_dropout": 1.0}, "wide", "0 <= p < 1")]


def definition(W, b, tensors, options):
    A, B = tensors["/pvera_A"][: options["r"]], tensors["/pvera_B"]
    mean = tensors["pvera_lambda_b"][:, None] * B @ (tensors["pvera_lambda_d"][: options["r"], None] * A)
    return W + mean.reshape(W.shape), b
