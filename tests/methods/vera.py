"""VeRA in PEFT: Linear, Conv1D."""

PEFT = [
    ({"r": 4}, "wide wide_without_bias wide_Conv1D"),
    ({"r": 4, "d_initial": 0.5, "projection_prng_key": 7, "init_weights": False}, "wide"),
    ({"r": 4, "target_modules": ["q_proj", "up_proj"]}, "llama"),
    ({"r": 4, "target_modules": ["c_attn"]}, "gpt2"),
]
DEFINED = [({"r": 4}, "wide_embedding")]
REFUSED = [({"r": 4}, "wide_conv2d wide_norm", "matrices")]


def definition(W, b, tensors, options):
    A, B = tensors["/vera_A"], tensors["/vera_B"]
    delta = tensors["vera_lambda_b"][:, None] * B @ (tensors["vera_lambda_d"][:, None] * A)
    return W + delta, b
