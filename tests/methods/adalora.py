"""AdaLoRA in PEFT: Linear, Conv1D, Conv2d without groups, whose dilation it ignores."""

import torch

BASE = {"total_step": 10, "init_r": 4, "target_r": 2}
KEPT = {"rank_pattern": {"layer.lora_E": [True, False, True, False]}}
PEFT = [
    (BASE, "wide wide_without_bias square wide_Conv1D wide_conv2d wide_conv2d_pointwise"),
    (BASE | {"lora_alpha": 3, "init_lora_weights": False}, "wide wide_Conv1D"),
    (BASE | {"lora_alpha": 0}, "wide"),
    (BASE | {"lora_dropout": 0.1}, "wide wide_conv2d"),
    (BASE | {"target_modules": ["q_proj", "down_proj"]}, "llama"),
    (BASE | {"target_modules": ["c_attn"]}, "gpt2"),
]
DEFINED = [
    (BASE, "wide_conv1d wide_conv2d_dilated wide_conv2d_grouped wide_conv3d wide_embedding"),
    (BASE | KEPT, "wide wide_conv2d"),
    (BASE | {"lora_dropout": 0.1}, "wide_conv2d_grouped wide_embedding"),
]
REFUSED = [
    (BASE, "wide_norm", "matrices"),
    ({}, "wide", "total_step"),
    (BASE | {"tinit": 9, "tfinal": 1}, "wide", "nearest valid tinit: 8"),
    (
        BASE | {"init_lora_weights": "gaussian"},
        "wide",
        "AdaLoRA that begins with 'gaussian' is not in this version yet",
    ),
    (BASE | {"orth_reg_weight": -1}, "wide", "orth_reg_weight: expected 0 or more"),
    (BASE | {"alpha_pattern": {"layer": 2}}, "wide", "no use"),
]


def definition(W, b, tensors, options):
    A, E, B = tensors["lora_A"], tensors["lora_E"], tensors["lora_B"]
    scale = options.get("lora_alpha", 8) / (options["init_r"] + 1e-5)
    return W + scale * torch.einsum("or,r,rn->on", B, E.flatten(), A).reshape(W.shape), b
