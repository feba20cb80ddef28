"""OSF in PEFT: Linear."""

import torch

PEFT = [
    ({}, "wide wide_without_bias square"),
    ({"effective_rank": 3}, "wide"),
    ({"effective_rank": 0.25}, "wide"),
    ({"rank_pattern": {"lay": 6}, "init_weights": False}, "wide"),
    ({"target_modules": ["q_proj", "up_proj", "down_proj"]}, "llama"),
]
DEFINED = [
    ({}, "wide_Conv1D wide_conv1d wide_conv2d wide_conv2d_pointwise wide_conv2d_dilated wide_conv2d_grouped"),
    ({}, "wide_conv3d wide_embedding"),
]
REFUSED = [
    ({}, "wide_norm", "matrices"),
    ({"effective_rank": 9}, "wide", "nearest valid: 7"),
    ({"effective_rank": 0}, "wide", "above 0"),
    ({"rank_pattern": {"lay": 0}}, "wide", "above 0"),
]


def definition(W, b, tensors, options):
    U, S, V = (tensors[f"osf_svd_params.{name}_low"] for name in "USV")
    u, s, v = torch.linalg.svd(W.flatten(1), full_matrices=False)
    k = len(s) // 2
    high = u[:, :k] @ torch.diag(s[:k]) @ v[:k]
    if U.requires_grad:
        U.register_hook(lambda g: g - u[:, :k] @ (u[:, :k].T @ g))
        V.register_hook(lambda g: g - (g @ v[:k].T) @ v[:k])
    return (high + U @ torch.diag(S) @ V).reshape(W.shape), b
