"""GLoRA in PEFT: exactly nn.Linear."""

R = {"r": 3}
VECTOR = {"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"}
CONSTANT = {"config_A_B": "constant", "config_C": "none", "config_D_E": "constant"}
PEFT = [
    (R, "wide wide_without_bias square"),
    (VECTOR, "wide wide_without_bias"),
    (CONSTANT, "wide wide_without_bias"),
    ({"config_A_B": "none", "config_C": "lora", "config_D_E": "none"}, "wide"),
    ({"r": 3, "config_D_E": "none"}, "wide"),
    ({"r": 3, "init_weights": False}, "wide"),
    ({**VECTOR, "init_weights": False}, "wide"),
    ({"r": 3, "target_modules": ["q_proj", "up_proj"]}, "llama"),
]
DEFINED = [
    (
        R,
        "wide_Conv1D wide_conv1d wide_conv2d wide_conv2d_pointwise wide_conv2d_dilated wide_conv2d_grouped wide_conv3d",
    ),
    (R, "wide_embedding"),
    (VECTOR, "wide_Conv1D wide_conv2d wide_embedding"),
    (CONSTANT, "wide_Conv1D wide_conv2d wide_embedding"),
]
REFUSED = [
    (R, "wide_norm", "matrices"),
    ({"config_C": "constant"}, "wide", "expected one of"),
]


def definition(W, b, tensors, options):
    def term(name):
        if f"glora_{name}.Xd" in tensors:
            return tensors[f"glora_{name}.Xd"] @ tensors[f"glora_{name}.Xu"]
        return tensors.get(f"glora_{name}.X", tensors.get(f"glora_{name}.zeros"))

    A, B, C, D, E = map(term, "ABCDE")
    flat = W.reshape(len(W), -1)
    new_b = None if b is None else b * (1 + D) + E + (flat @ C)[:, 0]
    return (flat * (1 + A) + B).reshape(W.shape), new_b
