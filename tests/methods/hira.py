"""HiRA in PEFT: Linear, Conv1D, Embedding, convolutions without groups."""

R = {"r": 3}
PEFT = [
    (R, "wide wide_without_bias square wide_Conv1D wide_embedding"),
    (R, "wide_conv1d wide_conv2d wide_conv2d_pointwise wide_conv2d_dilated wide_conv3d"),
    ({"r": 3, "init_weights": "gaussian"}, "wide wide_conv2d wide_embedding"),
    ({"r": 3, "init_weights": False}, "wide wide_conv2d wide_embedding"),
    ({"r": 3, "hira_dropout": 0.1}, "wide wide_Conv1D wide_conv2d wide_embedding"),
    ({"r": 3, "target_modules": ["q_proj", "up_proj"]}, "llama"),
    ({"r": 3, "target_modules": ["c_attn"]}, "gpt2"),
]
DEFINED = [
    (R, "wide_conv2d_grouped"),
    ({"r": 3, "hira_dropout": 0.1}, "wide_conv2d_grouped"),
    ({"r": 3, "rank_pattern": {"layer": 2}}, "wide wide_conv2d"),  # PEFT ignores the field
]
REFUSED = [
    (R, "wide_norm", "matrices"),
    ({"r": 3, "hira_dropout": 1}, "wide", "hira_dropout: expected 0 <= p < 1"),
    ({"r": 3, "rank_pattern": {"layer": 0}}, "wide", "rank_pattern.*expected an integer"),
]


def definition(W, b, tensors, options):
    A, B = tensors["hira_A"], tensors["hira_B"]
    rows = [sum(B[o, i].squeeze() * A[i] for i in range(len(A))) for o in range(W.shape[0])]
    import torch

    return W * (1 + torch.stack(rows)), b
