"""DoRA in PEFT (use_dora): Linear, Conv1D, Conv1d, Conv2d, Conv3d, Embedding; groups and dilation crash there."""

TYPE = "LORA"

DORA = {"r": 4, "use_dora": True}
PEFT = [
    (
        DORA,
        "wide wide_without_bias wide_Conv1D wide_conv1d wide_conv2d wide_conv2d_pointwise wide_conv3d wide_embedding",
    ),
    ({**DORA, "lora_alpha": 3, "use_rslora": True, "init_lora_weights": "gaussian"}, "square wide_embedding"),
    ({**DORA, "init_lora_weights": False}, "wide wide_conv2d wide_embedding"),
    ({**DORA, "rank_pattern": {"q_proj": 2}, "target_modules": ["q_proj", "down_proj"]}, "llama"),
    ({**DORA, "target_modules": ["c_attn"]}, "gpt2"),
    ({**DORA, "lora_dropout": 0.1}, "wide wide_without_bias wide_Conv1D wide_conv2d wide_embedding"),
]
DEFINED = [
    (DORA, "wide_conv2d_dilated wide_conv2d_grouped"),
    ({**DORA, "lora_dropout": 0.1}, "wide_conv2d_grouped"),
]
REFUSED = [
    (DORA, "wide_norm", "no form on a 1-d weight"),
    ({**DORA, "lora_bias": True}, "wide", "lora_bias is not part of DoRA"),
    ({**DORA, "r": 3}, "wide_conv2d_grouped", "r=3 is not divisible by groups=2; nearest valid: 2"),
]


def definition(W, b, tensors, options):
    import torch

    s = options.get("lora_alpha", 8) / options["r"]
    A, B = tensors["lora_A.weight"], tensors["lora_B.weight"].flatten(1)
    dense = torch.zeros(W.shape[0], A.shape[1], *W.shape[2:], dtype=W.dtype)
    groups, rows, m = A.shape[1] // W.shape[1], [], tensors["lora_magnitude_vector"].flatten()
    for o in range(W.shape[0]):
        g = o * groups // W.shape[0]
        row = dense[o].clone()
        row[g * W.shape[1] : (g + 1) * W.shape[1]] = W[o]
        for j in range(B.shape[1]):
            row = row + s * B[o, j] * A[g * B.shape[1] + j]
        rows.append(m[o] * row / row.square().sum().sqrt().detach())
    return torch.stack(rows), b
