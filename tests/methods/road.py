"""RoAd in PEFT: Linear."""

GROUPS = {"group_size": 4}
PEFT = [
    (GROUPS, "wide wide_without_bias square"),
    ({**GROUPS, "variant": "road_2"}, "wide wide_without_bias"),
    ({**GROUPS, "variant": "road_4"}, "wide wide_without_bias"),
    ({"group_size": 12, "init_weights": False}, "wide"),
    ({"group_size": 2, "variant": "road_4", "target_modules": ["q_proj", "down_proj"]}, "llama"),
]
OTHERS = "wide_Conv1D wide_conv1d wide_conv2d wide_conv2d_pointwise wide_conv2d_dilated wide_conv2d_grouped wide_conv3d"
DEFINED = [
    (GROUPS, f"{OTHERS} wide_embedding"),
    ({**GROUPS, "variant": "road_2"}, "wide_conv2d wide_embedding"),
    ({**GROUPS, "variant": "road_4"}, "wide_Conv1D wide_conv2d_grouped wide_embedding"),
]
REFUSED = [
    (GROUPS, "wide_norm", "1-d"),
    ({"group_size": 5}, "wide", "group_size: expected an even number of 2 or more, got 5"),
    ({"group_size": 8}, "wide", "group_size=8 does not divide 12 output features; nearest valid: 6"),
    ({"variant": "road_3"}, "wide", "variant='road_3': expected one of"),
]


def definition(W, b, tensors, options):
    import torch

    theta, alpha, m, g = tensors["road_theta"], tensors["road_alpha"], len(W), options["group_size"]
    variant = options.get("variant", "road_1")
    R = [[torch.zeros((), dtype=W.dtype) for _ in range(m)] for _ in range(m)]
    for group in range(0, m, g):
        for j in range(g // 2):
            for row, other, sign, at in ((j, j + g // 2, -1, j), (j + g // 2, j, 1, j + g // 2)):
                k = {"road_1": group // 2 + j, "road_2": group + at, "road_4": 2 * group + at}[variant]
                l = k + g if variant == "road_4" else k
                R[group + row][group + row] = alpha[k] * theta[k].cos()
                R[group + row][group + other] = sign * alpha[l] * theta[l].sin()
    R = torch.stack([torch.stack(row) for row in R])
    return (R @ W.flatten(1)).reshape(W.shape), None if b is None else R @ b
