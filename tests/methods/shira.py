"""SHiRA in PEFT: nn.Linear."""

R = {"r": 2}
PEFT = [
    (R, "wide wide_without_bias square"),
    ({"r": 2, "random_seed": 7}, "wide"),
    ({"r": 2, "init_weights": False}, "wide"),
    ({"r": 4, "target_modules": ["q_proj", "up_proj"]}, "llama"),
]
DEFINED = [
    (
        R,
        "wide_Conv1D wide_conv1d wide_conv2d wide_conv2d_pointwise wide_conv2d_dilated wide_conv2d_grouped wide_conv3d",
    ),
    (R, "wide_embedding"),
]
REFUSED = [
    (R, "wide_norm", "one matrix"),
    ({"r": 5}, "wide", "r=5 asks for 100 of 96 entries; largest valid: 4"),
    ({"mask_type": "mine"}, "wide", "expected 'random'"),
]


def definition(W, b, tensors, options):
    import torch

    delta = torch.zeros_like(W).reshape(len(W), -1)
    flat = [[delta[i, j] for j in range(delta.shape[1])] for i in range(len(delta))]
    for value, (i, j) in zip(tensors["shira_weight"], tensors["shira_indices"].T.tolist(), strict=True):
        flat[i][j] = flat[i][j] + value
    return W + torch.stack([torch.stack(row) for row in flat]).reshape(W.shape), b
