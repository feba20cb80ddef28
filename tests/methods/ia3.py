"""IA3 in PEFT: Linear, Conv1D, Conv2d, Conv3d."""

FEED_FORWARD = {"feedforward_modules": ["layer"]}
PEFT = [
    ({"feedforward_modules": []}, "wide wide_without_bias wide_Conv1D wide_conv2d wide_conv2d_grouped wide_conv3d"),
    (FEED_FORWARD, "wide wide_Conv1D wide_conv2d wide_conv3d"),
    ({"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}, "llama"),
]
DEFINED = [
    ({"feedforward_modules": []}, "wide_conv1d wide_embedding wide_conv2d_dilated"),
    (FEED_FORWARD, "wide_conv1d wide_conv2d_grouped"),
]
REFUSED = [({"feedforward_modules": []}, "wide_norm", "norm")]


def definition(W, b, tensors, options):
    l = tensors["ia3_l"].flatten()
    W = W.clone()
    if options["feedforward_modules"]:
        groups = len(l) // W.shape[1]
        rows = W.shape[0] // groups
        return W * torch_stack([l[o // rows * W.shape[1] :][: W.shape[1]] for o in range(W.shape[0])], W), b
    W = W * l.reshape(-1, *[1] * (W.dim() - 1))
    return W, None if b is None else b * l


def torch_stack(rows, W):
    import torch

    return torch.stack(rows).reshape(*W.shape[:2], *[1] * (W.dim() - 2))
