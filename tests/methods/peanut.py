"""PEANuT in PEFT: Linear."""

DEEP = {"r": 4, "depth": 2, "act_fn": "gelu_new", "scaling": 0.5}
PEFT = [
    ({"r": 4}, "wide wide_without_bias"),
    ({**DEEP, "init_weights": False}, "wide"),
    ({"r": 3, "depth": 1, "act_fn": "silu"}, "square"),
    *(
        ({"r": 4, "act_fn": name}, "wide_without_bias")
        for name in ("tanh", "leaky_relu", "quick_gelu", "mish", "gelu_10")
    ),
    ({"r": 4, "depth": 1, "target_modules": ["q_proj", "down_proj"]}, "llama"),
]
DEFINED = [
    ({"r": 4, "act_fn": "tanh"}, "wide_Conv1D wide_conv1d wide_conv2d wide_conv2d_pointwise wide_conv2d_dilated"),
    ({"r": 3, "act_fn": "tanh", "depth": 2, "scaling": 0.5}, "wide_conv2d_grouped wide_conv3d wide_embedding"),
]
REFUSED = [
    ({"r": 4}, "wide_norm", "matrix"),
    ({"r": 4, "act_fn": "prelu"}, "wide", "expected one of"),
    ({"r": 4, "depth": -1}, "wide", "depth"),
]


def definition(W, b, tensors, options):
    depth = options.get("depth", 0)
    encoders, decoders = (
        [tensors[f"peanut_{part}.{i}.weight"] for i in range(depth)] for part in ("encoders", "decoders")
    )
    V = W.flatten(1).T
    z = (V @ tensors["peanut_A.weight"].T).tanh()
    if depth:
        z1 = (z @ encoders[0].T).tanh()
        z2 = (z1 @ encoders[1].T).tanh()
        z = ((((z2 @ decoders[0].T).tanh() + z1) @ decoders[1].T).tanh()) + z
    delta = options.get("scaling", 1.0) * z @ tensors["peanut_B.weight"].T
    return W + delta.T.reshape(W.shape), b
