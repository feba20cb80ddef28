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
REFUSED = [(SMALL, "wide_norm", "matrices"), (SMALL | {"theta_d_length": 0}, "wide", "above 0")]


def definition(W, b, tensors, options):
    theta, positions = tensors["/unilora_theta_d"], [tensors[f"unilora_indices_{f}"] for f in "AB"]
    of_one_target = torch.cat([i.flatten() for i in positions]).tolist()
    # how often an entry occurs over all targets, where the caller knows of several
    occurrences = tensors.get("occurrences", torch.tensor([of_one_target.count(i) for i in range(len(theta))]))
    A, B = (theta[i] / occurrences[i].sqrt() for i in positions)
    return W + (B @ A).reshape(W.shape), b
