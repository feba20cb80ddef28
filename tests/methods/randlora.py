"""RandLoRA in PEFT: Linear, Conv1D."""

import torch

COPIES = ("randlora_A", "randlora_B")
R = {"r": 3, "randlora_alpha": 6}
PEFT = [
    (R, "wide wide_without_bias square wide_Conv1D"),
    ({**R, "save_projection": False, "projection_prng_key": 7}, "wide"),
    ({**R, "save_projection": False, "sparse": True, "init_weights": False}, "wide"),
    ({**R, "save_projection": False, "very_sparse": True, "randlora_dropout": 0.3}, "wide"),
    ({**R, "target_modules": ["q_proj", "up_proj", "down_proj"]}, "llama"),
    ({**R, "target_modules": ["q_proj", "up_proj", "down_proj"], "save_projection": False}, "llama"),
    ({**R, "target_modules": ["c_attn"]}, "gpt2"),
]
DEFINED = [
    (R, "wide_conv1d wide_conv2d wide_conv2d_pointwise wide_conv2d_dilated wide_conv2d_grouped wide_conv3d"),
    ({**R, "randlora_dropout": 0.1}, "wide_embedding"),
]
REFUSED = [
    (R, "wide_norm", "matrices"),
    ({"randlora_dropout": 1.5}, "wide", "0 <= p < 1"),
    ({"r": 0}, "wide", "from 1 to"),
]


def definition(W, b, tensors, options):
    A, B = tensors["/randlora_A"], tensors["/randlora_B"]
    lambda_, gamma = tensors["randlora_lambda"], tensors["randlora_gamma"]
    (r, bases), (low, high) = lambda_.shape, sorted(W.flatten(1).shape)
    update = torch.zeros(high, low, dtype=W.dtype)
    for t in range(r * bases):
        row = lambda_[t // bases, t % bases] * A[t // bases, 0, :low] * gamma[t % bases]
        update = update + torch.outer(B[:high, t // r, t % r], row)
    update = options["randlora_alpha"] / r * update
    update = update if W.flatten(1).shape[1] == low else update.T
    return W + update.reshape(W.shape), b
