"""Uni-LoRA in PEFT: Linear, Conv1D."""

import torch

SMALL = {"r": 3, "theta_d_length": 13}
PEFT = [
    (SMALL, "wide wide_without_bias square wide_Conv1D"),
    (SMALL | {"save_indices": True}, "wide wide_Conv1D"),
    (SMALL | {"proj_seed": 3, "init_weights": False}, "wide"),
    ({"r": 2, "theta_d_length": 1000}, "wide"),
    (SMALL | {"target_modules": ["q_proj", "up_proj"]}, "llama"),
    (SMALL | {"target_modules": ["c_attn"]}, "gpt2"),
]
DEFINED = [
    (SMALL, "wide_conv1d wide_conv2d wide_conv2d_pointwise wide_conv2d_dilated wide_conv2d_grouped wide_conv3d"),
    (SMALL, "wide_embedding"),
]
REFUSED = [(SMALL, "wide_norm", "matrices"), (SMALL | {"theta_d_length": 0}, "wide", "positive")]


def definition(W, b, tensors, options):
    theta = tensors["/unilora_theta_d"]
    n = len(tensors["unilora_indices_A"].flatten())
    both = [*tensors["unilora_indices_A"].flatten().tolist(), *tensors["unilora_indices_B"].flatten().tolist()]
    values = [theta[i] / both.count(i) ** 0.5 for i in both]
    A = torch.stack(values[:n]).reshape(options["r"], -1)
    B = torch.stack(values[n:]).reshape(-1, options["r"])
    return W + (B @ A).reshape(W.shape), b
