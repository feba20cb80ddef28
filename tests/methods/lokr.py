"""LoKr in PEFT: Linear, Conv1d, Conv2d with groups."""

R = {"r": 1, "alpha": 5}
WHOLE = {"r": 4, "alpha": 5}
EFFECTIVE = {**R, "use_effective_conv2d": True}
BOTH = {**R, "decompose_both": True}
PEFT = [
    (
        R,
        "wide wide_without_bias square wide_conv1d wide_conv2d wide_conv2d_pointwise wide_conv2d_dilated wide_conv2d_grouped",
    ),
    (WHOLE, "wide wide_conv1d wide_conv2d wide_conv2d_pointwise wide_conv2d_dilated wide_conv2d_grouped"),
    (EFFECTIVE, "wide wide_conv2d wide_conv2d_pointwise wide_conv2d_dilated wide_conv2d_grouped"),
    (BOTH, "wide wide_conv1d wide_conv2d"),
    ({**BOTH, "decompose_factor": 4}, "wide wide_conv2d"),
    ({**R, "decompose_factor": 2}, "wide"),
    ({**R, "decompose_factor": 5}, "wide"),
    ({"r": 1, "rank_dropout": 0.2, "module_dropout": 0.3, "rank_dropout_scale": True}, "wide wide_conv2d"),
    ({"r": 1, "init_weights": False}, "wide wide_conv2d"),
    ({"r": 1, "init_weights": "lycoris"}, "wide wide_conv2d"),
    ({"r": 4, "init_weights": "lycoris"}, "wide"),
    (
        {
            "r": 4,
            "target_modules": ["q_proj", "up_proj"],
            "rank_pattern": {"up_proj": 1},
            "alpha_pattern": {"up_proj": 3},
        },
        "llama",
    ),
]
DEFINED = [
    (R, "wide_Conv1D wide_conv3d wide_embedding"),
    (WHOLE, "wide_Conv1D wide_conv3d wide_embedding"),
    (R | {"rank_dropout": 0.2}, "wide_Conv1D wide_conv3d wide_embedding"),
    (EFFECTIVE, "wide_conv1d wide_conv3d"),  # PEFT raises on Conv1d: its kron needs another layout
]
REFUSED = [
    (R, "wide_norm", "matrices"),
    ({"init_weights": "gaussian"}, "wide", "expected one of"),
]


def definition(W, b, tensors, options):
    import torch

    w1 = tensors["lokr_w1"]
    kernel = W.shape[2:]
    if "lokr_w2" in tensors:
        w2 = tensors["lokr_w2"].reshape(*tensors["lokr_w2"].shape[:2], -1)
    elif "lokr_t2" in tensors:
        T, A, B = (tensors[f"lokr_{n}"] for n in ("t2", "w2_a", "w2_b"))
        w2 = torch.stack([A.T @ T.flatten(2)[..., h] @ B for h in range(T.flatten(2).shape[-1])], dim=-1)
    else:
        w2 = tensors["lokr_w2_a"] @ tensors["lokr_w2_b"]
        w2 = w2.reshape(len(w2), W.shape[1] // w1.shape[1], -1)
    taps = torch.stack([torch.kron(w1, w2[..., h]) for h in range(w2.shape[-1])], dim=-1)
    return W + options["alpha"] / options["r"] * taps.reshape(W.shape[0], W.shape[1], *kernel), b
