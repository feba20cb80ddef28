"""LoHa in PEFT: Linear, Conv1d, Conv2d with groups."""

R = {"r": 3, "alpha": 5}
EFFECTIVE = {**R, "use_effective_conv2d": True}
PEFT = [
    (
        R,
        "wide wide_without_bias square wide_conv1d wide_conv2d wide_conv2d_pointwise wide_conv2d_dilated wide_conv2d_grouped",
    ),
    (EFFECTIVE, "wide wide_conv2d_pointwise"),
    ({"r": 3, "rank_dropout": 0.2, "module_dropout": 0.3}, "wide wide_conv2d"),
    ({"r": 3, "init_weights": False}, "wide"),
    (
        {"target_modules": ["q_proj", "up_proj"], "rank_pattern": {"up_proj": 2}, "alpha_pattern": {"up_proj": 3}},
        "llama",
    ),
]
DEFINED = [
    (R, "wide_Conv1D wide_conv3d wide_embedding"),
    ({"r": 3, "rank_dropout": 0.2}, "wide_embedding"),
    ({**EFFECTIVE, "rank_dropout": 0.2}, "wide_conv2d wide_conv3d"),
    # PEFT's outputs are the same, but its gradient of hada_w1_a is taken with the other product's core
    (EFFECTIVE, "wide_conv1d wide_conv2d wide_conv2d_dilated wide_conv2d_grouped wide_conv3d"),
]
REFUSED = [
    (R, "wide_norm", "matrices"),
    ({"rank_dropout": 1.5}, "wide", "expected 0 <= p < 1"),
]


def definition(W, b, tensors, options):
    s = options.get("alpha", 8) / options["r"]
    products = []
    for i in "12":
        A, B = tensors[f"hada_w{i}_a"], tensors[f"hada_w{i}_b"]
        if f"hada_t{i}" in tensors:
            T = tensors[f"hada_t{i}"]
            r, kernel = T.shape[0], T.shape[2:]
            P = sum(
                A[p].reshape(-1, 1, *[1] * len(kernel)) * B[q].reshape(1, -1, *[1] * len(kernel)) * T[p, q]
                for p in range(r)
                for q in range(r)
            )
        else:
            P = A @ B
        products.append(P.reshape(W.shape))
    return W + s * products[0] * products[1], b
