"""GraLoRA in PEFT: Linear, Conv1D."""

R = {"r": 4, "alpha": 6}
HYBRID = {**R, "hybrid_r": 3}
PEFT = [
    (R, "wide wide_without_bias square wide_Conv1D"),
    (HYBRID, "wide wide_Conv1D"),
    ({**HYBRID, "gralora_k": 4}, "wide"),
    ({**HYBRID, "gralora_dropout": 0.1}, "wide"),
    ({**HYBRID, "gralora_k": 1, "init_weights": False}, "wide"),
    ({**R, "target_modules": ["q_proj", "up_proj"]}, "llama"),
    ({**R, "target_modules": ["c_attn"]}, "gpt2"),
]
DEFINED = [
    (
        R,
        "wide_conv1d wide_conv2d wide_conv2d_pointwise wide_conv2d_dilated wide_conv2d_grouped wide_conv3d wide_embedding",
    ),
    (HYBRID, "wide_conv2d wide_embedding"),
    ({**HYBRID, "gralora_dropout": 0.1}, "wide_conv2d_grouped wide_embedding"),
]
REFUSED = [
    (R, "wide_norm", "matrices"),
    ({"r": 5, "gralora_k": 5}, "wide", r"gralora_k=5 does not divide both 12 and 8; valid with r=5: \[1\]"),
    ({"r": 5}, "wide", "nearest valid: 4"),
    ({"r": 4, "gralora_dropout": 1.0}, "wide", "gralora_dropout: expected 0 <= p < 1"),
]


def definition(W, b, tensors, options):
    import torch

    A, B = tensors["gralora_A"], tensors["gralora_B"]
    k, _, r = A.shape
    q = r // k
    rows = [
        torch.cat([(A[c][:, a * q : (a + 1) * q] @ B[a][c * q : (c + 1) * q]).T for c in range(k)], dim=1)
        for a in range(k)
    ]
    delta = torch.cat(rows)
    if options.get("hybrid_r"):
        delta = delta + tensors["gralora_B_general.weight"] @ tensors["gralora_A_general.weight"]
    return W + options["alpha"] / (r + options.get("hybrid_r", 0)) * delta.reshape(W.shape), b
