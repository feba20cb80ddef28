"""MiSS in PEFT: Linear."""

BAT, MINI = {"r": 4, "init_weights": "bat"}, {"r": 4, "init_weights": "mini", "mini_r": 3}
ELSEWHERE = "wide_Conv1D wide_conv1d wide_conv2d wide_conv2d_pointwise wide_conv2d_dilated wide_conv2d_grouped wide_conv3d wide_embedding"
PEFT = [
    ({"r": 3}, "wide wide_without_bias"),
    ({"r": 4, "init_weights": False}, "wide"),
    (BAT, "wide wide_without_bias"),
    (MINI, "wide wide_without_bias"),
    ({"r": 2}, "square"),
    ({"r": 5, "target_modules": ["q_proj", "down_proj"]}, "llama"),
]
DEFINED = [
    ({"r": 4}, ELSEWHERE),
    (BAT, ELSEWHERE),
    ({"r": 3, "init_weights": "mini", "mini_r": 2}, "wide_Conv1D wide_conv2d wide_conv2d_grouped wide_embedding"),
]
REFUSED = [
    ({"r": 4}, "wide_norm", "norm"),
    ({"r": 9}, "wide", "nearest valid: 8"),
    ({"r": 3, "init_weights": "bat"}, "wide", "nearest valid: 2"),
    ({"r": 4, "init_weights": "mini", "mini_r": 5}, "wide", "nearest valid: 4"),
]


def definition(W, b, tensors, options):
    r, M, flat = options["r"], tensors["miss_block"], W.flatten(1)
    m, n = flat.shape
    if options.get("init_weights") == "bat":
        rows = []
        for o in range(0, m, r):
            blocks = [flat[o : o + r, i : i + r] for i in range(0, n, r)]
            rows.append(cat([block + block @ M[o // r] + M[o // r] for block in blocks], 1))
        return cat(rows, 0).reshape(W.shape), b
    return stack([stack([flat[o, j] + M[j % r, o % M.shape[1]] for j in range(n)]) for o in range(m)]).reshape(
        W.shape
    ), b


def cat(parts, axis):
    import torch

    return torch.cat(parts, axis)


def stack(parts):
    import torch

    return torch.stack(parts)
