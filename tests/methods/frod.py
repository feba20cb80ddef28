"""FRoD in PEFT: Linear, Conv1D."""

import torch

PEFT = [
    ({"progressbar": False}, "wide wide_without_bias square wide_Conv1D"),
    ({"progressbar": False, "sparse_rate": 0.2, "projection_prng_key": 3, "init_weights": False}, "wide wide_Conv1D"),
    ({"progressbar": False, "sparse_rate": 0.1, "save_projection": False, "regularization_alpha": 0.1}, "wide"),
    ({"progressbar": False, "sparse_rate": 0.1, "target_modules": ["q_proj", "down_proj"]}, "llama"),
    ({"progressbar": False, "target_modules": ["c_attn"], "save_projection": False}, "gpt2"),
]
DEFINED = [
    ({"sparse_rate": 0.1}, "wide_conv1d wide_conv2d wide_conv2d_pointwise wide_conv2d_dilated wide_conv2d_grouped"),
    ({"sparse_rate": 0.1}, "wide_conv3d wide_embedding"),
    ({"sparse_rate": 0.0}, "wide"),  # PEFT gives the empty tensor no gradient
]
REFUSED = [
    ({}, "wide_norm", "matrices"),
    ({"frod_dropout": 1.0}, "wide", "frod_dropout"),
    ({"sparse_rate": 2.0}, "wide", "expected 0 to 1"),
]


def definition(W, b, tensors, options):
    (V,), (positions,) = ([t for key, t in tensors.items() if part in key] for part in ("frod_V", "frod_s_indices"))
    l, values = tensors["frod_lambda_l"], tensors["frod_lambda_s_values"]
    columns = torch.linalg.solve(V, W.flatten(1).T).T
    U = columns / columns.norm(dim=0)
    S = torch.diag(l) + 0 * values.sum()
    for (i, j), value in zip(positions.T.tolist(), values, strict=True):
        cell = torch.zeros_like(S)
        cell[i, j] = 1
        S = S + value * cell
    return (U @ S @ V.T).reshape(W.shape), b
