"""HRA in PEFT: Linear, Conv2d (square kernels, no dilation, no groups)."""

PEFT = [
    ({"r": 4}, "wide wide_without_bias square wide_conv2d wide_conv2d_pointwise"),
    ({"r": 3, "init_weights": False}, "wide wide_conv2d"),
    ({"r": 4, "apply_GS": True}, "wide wide_conv2d"),
    ({"r": 2, "target_modules": ["q_proj", "down_proj"]}, "llama"),
]
DEFINED = [
    ({"r": 4}, "wide_Conv1D wide_conv1d wide_conv2d_dilated wide_conv2d_grouped wide_conv3d"),
    ({"r": 3, "apply_GS": True}, "wide wide_Conv1D wide_conv2d_grouped"),
]
REFUSED = [
    ({"r": 4}, "wide_embedding", "token ids"),
    ({"r": 4}, "wide_norm", "1-d"),
    ({"r": 9, "apply_GS": True}, "wide", "r=9 .* nearest valid: 8"),
    ({"r": 0}, "wide", "expected an integer from 1"),
]


def definition(W, b, tensors, options):
    U, flat = tensors["hra_u"], W.flatten(1)
    done = []
    for u in U.T:
        if options.get("apply_GS"):
            for q in done:
                u = u - q * (q @ u)
        u = u / u.square().sum().sqrt()
        done.append(u)
        flat = flat - 2 * (flat @ u)[:, None] * u[None, :]
    return flat.reshape(W.shape), b
